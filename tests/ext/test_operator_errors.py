"""What the public operators say to arguments that do not fit: name, expectation, what came."""

import pytest
import torch
from operator_calls import CALLS, operands, others, run

ENTRIES = {name: others(name) | operands(name) for name in CALLS}
TENSORS = [
    (name, key)
    for name, entry in ENTRIES.items()
    for key, value in entry.items()
    if isinstance(value, torch.Tensor)
]
every_tensor = pytest.mark.parametrize(("name", "key"), TENSORS)


def error_of(name, **changes):
    """The message of the ValueError that a call with changed arguments raises, None without one."""
    try:
        run(name, ENTRIES[name] | changes)
    except ValueError as error:
        operator, message = str(error).split(": ", 1)
        assert operator == name
        return message
    return None


def kind_of(name, key):
    call = CALLS[name]
    kinds = {"operand": call.operands, "mask": call.masks, "offsets": call.offsets}
    return next((kind for kind, names in kinds.items() if key in names), "seed")


# kind -> dtype that it never has, what is expected and how a tensor and a list are called
EXPECTED = {
    "operand": (torch.int64, "float32, bfloat16, float16 or float64", "{dtype}"),
    "mask": (torch.float32, "a bool tensor (True = attend, real)", "{dtype}"),
    "offsets": (torch.int64, "an int32 tensor of shape (B + 1,)", "{dtype} of shape {shape}"),
    "seed": (
        torch.int32,
        "an int, a one-element int64 tensor or None",
        "{dtype} of shape {shape}",
    ),
}


@every_tensor
def test_dtype_that_never_fits(name, key):
    dtype, expected, came = EXPECTED[kind_of(name, key)]
    value = ENTRIES[name][key].to(dtype)
    came = came.format(dtype=dtype, shape=tuple(value.shape))
    assert error_of(name, **{key: value}) == f"{key} must be {expected}, got {came}"


@every_tensor
def test_no_tensor_at_all(name, key):
    _, expected, _ = EXPECTED[kind_of(name, key)]
    expected = "a tensor" if kind_of(name, key) == "operand" else expected
    assert error_of(name, **{key: [1.0]}) == f"{key} must be {expected}, got list"


@pytest.mark.parametrize(("name", "key"), [x for x in TENSORS if kind_of(*x) == "operand"])
def test_operands_of_two_dtypes(name, key):
    """The first operand decides, so that when it changes the second is the one to blame."""
    first, *rest = CALLS[name].operands
    found = error_of(name, **{key: ENTRIES[name][key].double()})
    if key != first:
        assert found == f"{key} must have {first}'s dtype torch.float32, got torch.float64"
    elif rest:
        assert found == f"{rest[0]} must have {first}'s dtype torch.float64, got torch.float32"
    else:
        assert found is None


@every_tensor
def test_tensors_on_two_devices(name, key):
    first, second, *_ = CALLS[name].axes()
    found = error_of(name, **{key: ENTRIES[name][key].to("meta")})
    blamed, there, came = (second, "meta", "cpu") if key == first else (key, "cpu", "meta")
    like = first if kind_of(name, blamed) == "operand" else "the operands"
    assert found == f"{blamed} must be on the device of {like}, {there}, got {came}"


def first_misfit(axes, shapes):
    """The error for the first shape that contradicts its axes or those before it, or None."""
    known = {}
    for key, letters in axes.items():
        sizes = [int(x) if x.isdigit() else known.get(x) for x in letters]
        found = shapes[key]
        if any(want not in (None, got) for want, got in zip(sizes, found, strict=True)):
            spelled = [tuple_of(letters), tuple_of("any" if x is None else x for x in sizes)]
            return f"{key} must have shape {' = '.join(spelled)}, got {tuple(found)}"
        known |= zip(letters, found, strict=True)
    return None


def tuple_of(words):
    words = [str(word) for word in words]
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


@pytest.mark.parametrize(
    ("name", "key", "axis"),
    [
        (name, key, axis)
        for name, call in CALLS.items()
        for key, letters in call.axes().items()
        for axis in range(len(letters))
    ],
)
def test_every_axis_one_longer(name, key, axis):
    """An axis that nothing else shares may have any size; elsewhere the first misfit is named."""
    value = ENTRIES[name][key]
    longer = torch.cat([value, value.narrow(axis, 0, 1)], axis)
    axes = CALLS[name].axes()
    shapes = {k: (ENTRIES[name] | {key: longer})[k].shape for k in axes}
    assert error_of(name, **{key: longer}) == first_misfit(axes, shapes)


@pytest.mark.parametrize(("name", "key"), [x for x in TENSORS if kind_of(*x) != "seed"])
def test_too_few_axes(name, key):
    letters = tuple_of(CALLS[name].axes()[key])
    found = error_of(name, **{key: ENTRIES[name][key].flatten()[0]})
    if kind_of(name, key) == "offsets":
        assert (
            found
            == f"{key} must be an int32 tensor of shape {letters}, got torch.int32 of shape ()"
        )
    else:
        assert found.startswith(f"{key} must have shape {letters}")
        assert found.endswith(", got ()")


OF_ATTENTION = [name for name, call in CALLS.items() if "dropout_p" in call.settings]


@pytest.mark.parametrize("name", OF_ATTENTION)
def test_dropout_settings(name):
    for p in (1.0, -0.5, float("nan")):
        assert error_of(name, dropout_p=p) == f"dropout_p must be in [0, 1), got {p}"
    assert error_of(name, dropout_seed=torch.tensor([1, 2])) == (
        "dropout_seed must be an int, a one-element int64 tensor or None, "
        "got torch.int64 of shape (2,)"
    )


# What the settings and sizes of one operator alone do not allow.
VALUES = [
    ("masked_attention_varlen", {"max_seqlen_q": -1}, "max_seqlen_q must be an int >= 0, got -1"),
    ("masked_attention_varlen", {"max_seqlen_k": 2.5}, "max_seqlen_k must be an int >= 0, got 2.5"),
    (
        "masked_attention_varlen",
        {"cu_seqlens_q": torch.empty(0, dtype=torch.int32)},
        "cu_seqlens_q must be an int32 tensor of shape (B + 1,), got torch.int32 of shape (0,)",
    ),
    ("memory_attention", {"topk": 0}, "topk must be an int >= 1 or None, got 0"),
    ("memory_attention", {"topk": 2.0}, "topk must be an int >= 1 or None, got 2.0"),
    (
        "memory_attention",
        {"memory_key": torch.empty(0, 2, 8), "memory_value": torch.empty(0, 2, 8)},
        "memory_key must hold at least one slot, got 0",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), VALUES)
def test_values(name, changes, message):
    assert error_of(name, **changes) == message
