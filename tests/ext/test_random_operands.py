"""The compiled CPU kernels on random sizes, strides, masks and dtypes, against the definition.

Thousands of examples in a usual run, 10,000 an operator by `make fuzz`. Where a choice hangs on
which of two numbers is larger, operands are small integers: products are exact in every dtype, and
ties are many.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mpma_ext
from mpma_ext import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around the widths of the kernels' vectors (4, 8, 16) and tiles (24, 48, 96, 128, 256).
SHORT = st.one_of(st.integers(0, 20), st.sampled_from([23, 24, 25, 48, 50, 63, 64, 65]))
LONG = st.one_of(SHORT, st.sampled_from([95, 97, 127, 128, 129, 197, 255, 257]))
WIDTH = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 100, 128]))
FEW = st.integers(0, 3)
MAGNITUDE = st.sampled_from([0.1, 1.0, 4.0])


@dataclass
class Call:
    """One call: floating operands by name, and everything else."""

    function: str
    operands: dict[str, Tensor]  # float32, rounded to the dtype
    rest: dict = field(default_factory=dict)
    poisoned: dict[str, Tensor] = field(default_factory=dict)  # True for a masked row
    integers: tuple[str, ...] = ()  # operands whose ties a nudge would break


def numbers(draw, generator, shape, dtype, integers=False) -> Tensor:
    """Random operands in float32 that `dtype` holds exactly."""
    if integers:
        return torch.randint(-3, 4, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator) * draw(MAGNITUDE)
    return values.to(dtype).float()


def mask(draw, generator, batch, length) -> Tensor | None:
    """None, or True for what is real: a random share of it, none of it at times."""
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]))
    if share is None:
        return None
    return torch.rand(batch, length, generator=generator) < share


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan)
        return wide[..., 1::2].copy_(tensor)
    if layout == "inner":  # the heads or rows of a larger tensor
        wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3, *tensor.shape[2:]), torch.nan)
        return wide[:, 2:-1].copy_(tensor)
    return tensor


def outcome(call: Call, function: Callable, wanted, grads, *, dtype, layouts=None, poison=False):
    """Results and the wanted gradients of one evaluation in `dtype`."""
    leaves, views = {}, {}
    for number, (name, operand) in enumerate(call.operands.items()):
        values = operand.detach().to(dtype)
        if poison and name in call.poisoned:
            values = values.clone()
            values[call.poisoned[name]] = (torch.nan, torch.inf)[number % 2]
        leaves[name] = values.requires_grad_(name in wanted)
        views[name] = laid_out(values, layouts[number]) if layouts else values
    results = function(**views, **call.rest)
    results = results if isinstance(results, tuple) else (results,)
    if not wanted:
        return [r.detach() for r in results], []
    grads = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    gradients = torch.autograd.grad(results, [leaves[n] for n in wanted], grads)
    return [r.detach() for r in results], list(gradients)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check_drawn(draw, generator, call: Call, dtype) -> None:
    """`check` with any of the gradients wanted and any layouts."""
    layouts = st.sampled_from(["contiguous", "transposed", "sliced", "inner"])
    wanted = [name for name in call.operands if draw(st.booleans())]
    check(generator, call, dtype, wanted, [draw(layouts) for _ in call.operands])


def check(generator, call: Call, dtype, wanted, layouts) -> None:
    """Errors of the kernel are at most twice eager's in its dtype, three times for gradients.

    Eager is the definition in that dtype; for float64, in float32, its error times the ratio of
    their roundings. As eager may by luck be exact, its error is taken to be at least what operands
    off by 3 √n roundings make of the result, the most of a few draws: √n is the deviation of n
    independent roundings, those of the longest sum, and 3 deviations is where chance ends. One
    rounding of the result in its own dtype is allowed for.
    """
    kernel, definition = getattr(mpma_ext, call.function), getattr(reference, call.function)
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    shapes = [r.shape for r in outcome(call, definition, [], None, dtype=torch.float64)[0]]
    grads = [torch.randn(s, generator=generator).to(dtype).double() for s in shapes]

    def compiled(**arguments):
        return kernel(**arguments, backend="cpu")

    ours = outcome(call, compiled, wanted, grads, dtype=dtype, layouts=layouts, poison=True)
    eager = outcome(call, definition, wanted, grads, dtype=eager_dtype)
    truth = outcome(call, definition, wanted, grads, dtype=torch.float64)
    longest = max(size for operand in call.operands.values() for size in operand.shape)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = 3 * longest**0.5 * torch.finfo(sums).eps

    def nudge(tensor, by=rounding):
        signs = torch.randint(0, 2, tensor.shape, generator=generator).double() * 2 - 1
        return tensor.double() * (1 + by * signs)

    def moved():
        nudged = {n: t if n in call.integers else nudge(t) for n, t in call.operands.items()}
        # A row's weights come from a log-sum-exp as large as its scores, rounded when it was kept.
        moved_grads = [nudge(grad, rounding * max(1, largest_score(call))) for grad in grads]
        return outcome(
            replace(call, operands=nudged), definition, wanted, moved_grads, dtype=torch.float64
        )

    draws = [moved() for _ in range(3)]
    for factor, part, names in ((2, 0, [None] * len(grads)), (3, 1, wanted)):
        for got, plain, exact, name, *near in zip(
            ours[part], eager[part], truth[part], names, *(d[part] for d in draws), strict=True
        ):
            error = largest(plain - exact) * torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
            error = max(error, *(largest(n - exact) for n in near))
            error = max(error, cancelled(call, name, grads, truth[0], rounding, dtype))
            allowed = factor * error + torch.finfo(got.dtype).eps * largest(exact)
            assert got.isfinite().all(), f"{call.function}: not finite"
            assert largest(got - exact) <= allowed, f"{largest(got - exact)} > {allowed}"
    for name, gradient in zip(wanted, ours[1], strict=True):
        if name in call.poisoned:
            assert not gradient[call.poisoned[name]].any(), f"{name}: gradient of what is masked"


def largest_score(call: Call) -> float:
    """At most so large are an attention's scaled scores; 0 for the similarities."""
    if "tokens" in call.operands:
        return 0.0
    query, key, _ = call.operands.values()
    scale = abs(call.rest.get("scale", query.shape[-1] ** -0.5))
    return scale * largest(query.norm(dim=-1)) * largest(key.norm(dim=-1))


def cancelled(call: Call, name: str | None, grads, outputs, rounding, dtype) -> float:
    """The rounding of terms that cancel in a gradient, however small is what remains of them.

    Attention: the gradient of a score is weight · (⟨dO, v⟩ - ⟨dO, output⟩), equal terms where one
    key has all the weight; it multiplies the operand that is scored. The output was kept in its own
    dtype. Softmax similarity: the gradient of a cosine is (ĉ - cos · ŵ) / |w|, equal terms where
    token and attended patch are parallel.
    """
    operands = call.operands
    if name in ("query", "key", "memory_key"):
        query, key, _ = operands.values()
        scored = largest(key if name == "query" else query)
        scale = abs(call.rest.get("scale", query.shape[-1] ** -0.5))
        terms = (grads[0] * outputs[0]).abs().sum(-1)
        return max(rounding, torch.finfo(dtype).eps) * largest(terms) * scored * scale
    if name == "tokens" and "pooling_temperature" in call.rest and operands["tokens"].numel():
        shortest = operands["tokens"].norm(dim=-1).min().item()
        return rounding * call.rest["pooling_temperature"] * largest(grads[0]) / shortest
    return 0.0


def dropout(draw) -> dict:
    return draw(st.sampled_from([{}, {"dropout_p": 0.3, "dropout_seed": -5}, {"dropout_p": 0.0}]))


def scale(draw) -> dict:
    return draw(st.sampled_from([{}, {"scale": 0.5}, {"scale": -1.5}]))


@st.composite
def generators(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_masked_attention(data, generator, dtype):
    draw = data.draw
    batch, heads, width, queries, keys = map(draw, (FEW, FEW, WIDTH, LONG, LONG))
    shown = mask(draw, generator, batch, keys)
    shapes = {"query": queries, "key": keys, "value": keys}
    call = Call(
        "masked_attention",
        {
            name: numbers(draw, generator, (batch, length, heads, width), dtype)
            for name, length in shapes.items()
        },
        {"key_padding_mask": shown, **dropout(draw), **scale(draw)},
    )
    if shown is not None:
        call.poisoned = {"key": ~shown, "value": ~shown}
    check_drawn(draw, generator, call, dtype)


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_masked_attention_varlen(data, generator, dtype):
    draw = data.draw
    heads, width = draw(FEW), draw(WIDTH)
    lengths = draw(st.lists(st.tuples(SHORT, SHORT), max_size=4))
    ends = torch.tensor([(0, 0), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    beyond = draw(st.integers(0, 2))  # rows after the last sequence
    queries, keys = (int(n) + beyond for n in ends[-1])
    shapes = {"query": queries, "key": keys, "value": keys}
    call = Call(
        "masked_attention_varlen",
        {
            name: numbers(draw, generator, (length, heads, width), dtype)
            for name, length in shapes.items()
        },
        {
            "cu_seqlens_q": ends[:, 0].contiguous(),
            "cu_seqlens_k": ends[:, 1].contiguous(),
            "max_seqlen_q": max((q for q, _ in lengths), default=0),
            "max_seqlen_k": max((k for _, k in lengths), default=0),
            **dropout(draw),
            **scale(draw),
        },
    )
    check_drawn(draw, generator, call, dtype)


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_memory_attention(data, generator, dtype):
    draw = data.draw
    rows, heads, width = draw(LONG), draw(FEW), draw(WIDTH)
    slots = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 300, 2049])))
    topk = draw(st.one_of(st.none(), st.integers(1, slots + 1)))
    exact = topk is not None and topk < slots
    call = Call(
        "memory_attention",
        {
            "query": numbers(draw, generator, (rows, heads, width), dtype, integers=exact),
            "memory_key": numbers(draw, generator, (slots, heads, width), dtype, integers=exact),
            "memory_value": numbers(draw, generator, (slots, heads, width), dtype),
        },
        # A power of two keeps exact products exact.
        {"topk": topk, **dropout(draw), "scale": draw(st.sampled_from([0.125, -0.5]))},
        integers=("query", "memory_key") if exact else (),
    )
    check_drawn(draw, generator, call, dtype)


def similarity(draw, generator, function: str, dtype, integers: bool) -> Call:
    reports, images = draw(FEW), draw(FEW)
    tokens, patches = draw(SHORT), draw(LONG)
    # Of width 1 every cosine is 1 or -1, and all there is of its gradient is what did not cancel.
    width = draw(WIDTH.filter(lambda n: integers or n > 1))
    real = {
        "tokens": mask(draw, generator, reports, tokens),
        "patches": mask(draw, generator, images, patches),
    }
    shapes = {"tokens": (reports, tokens, width), "patches": (images, patches, width)}
    return Call(
        function,
        {
            name: numbers(draw, generator, shape, dtype, integers=integers)
            for name, shape in shapes.items()
        },
        {"token_mask": real["tokens"], "patch_mask": real["patches"]},
        {name: ~m for name, m in real.items() if m is not None},
        ("tokens", "patches") if integers else (),
    )


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_token_patch_similarity(data, generator, dtype):
    call = similarity(data.draw, generator, "token_patch_similarity", dtype, integers=False)
    temperatures = st.sampled_from([(4.0, 5.0), (-2.0, 0.5), (8.0, 1.0), (60.0, 1.0)])
    attention, pooling = data.draw(temperatures)
    call.rest |= {"attention_temperature": attention, "pooling_temperature": pooling}
    check_drawn(data.draw, generator, call, dtype)


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_token_patch_max_similarity(data, generator, dtype):
    call = similarity(data.draw, generator, "token_patch_max_similarity", dtype, integers=True)
    check_drawn(data.draw, generator, call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_wrong_gradient_is_found(dtype, factor, name, monkeypatch):
    right = mpma_ext.masked_attention

    def wrong(**arguments):
        exact = arguments[name]
        arguments[name] = exact.detach() + factor * (exact - exact.detach())
        return right(**arguments)

    generator = torch.Generator().manual_seed(0)
    shape = (1, 64, 2, 64)
    operands = {n: torch.randn(shape, generator=generator) for n in ("query", "key", "value")}
    call = Call("masked_attention", {n: t.to(dtype).float() for n, t in operands.items()})
    check(generator, call, dtype, list(operands), ["contiguous"] * 3)
    monkeypatch.setattr(mpma_ext, "masked_attention", wrong)
    with pytest.raises(AssertionError, match=">"):
        check(generator, call, dtype, list(operands), ["contiguous"] * 3)
