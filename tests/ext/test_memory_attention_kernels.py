"""The compiled CPU kernel of memory attention against a float64 evaluation in plain PyTorch."""

import itertools

import pytest
import torch
from kernels_under_test import BACKEND, DTYPES, INTERPRETED, MOST_KEPT, OPS, cpu_only

from mpma_ext.backends import COMPILED
from mpma_ext.reference.philox import memory_dropout_keep

forward = OPS.memory_attention
backward = OPS.memory_attention_backward
SEED = torch.tensor([-(2**40) - 17])
NAMES = ("output", "gradient of query", "gradient of memory_key", "gradient of memory_value")

# R, H, D, N, K (0 = dense)
SHAPES = [
    (50, 2, 64, 300, 32),  # the model's: 50 rows are two blocks of 24 and a rest
    (7, 3, 5, 17, 1),  # nothing fits a vector, and one slot is all of the softmax
    (7, 3, 5, 17, 16),  # every slot but one
    (3, 1, 33, 5000, 70),  # a bank of three tiles
    (3, 1, 16, 2100, 2090),  # more slots kept than a tile holds
    (20, 2, 100, 600, 64),  # a wide head, and the most slots that the GPU kernels keep
    (70, 1, 128, 150, 0),  # dense, the widest head of the GPU kernels
    (7, 3, 5, 17, 0),  # dense, nothing fits a vector
    (100, 1, 64, 600, 0),  # dense, three blocks of rows and three tiles of slots
    (5, 2, 8, 2200, 0),  # dense, several tiles of slots a task of the backward
    (100, 40, 8, 300, 0),  # dense, so many heads that one task has all of a head's tiles
]
SHAPES = [shape for shape in SHAPES if shape[-1] <= MOST_KEPT]
if INTERPRETED or BACKEND == "emulated":
    SHAPES.remove((100, 40, 8, 300, 0))  # its trap is the CPU kernel's
    SHAPES[SHAPES.index((50, 2, 64, 300, 32))] = (34, 1, 64, 130, 32)  # two tiles of each
    SHAPES[SHAPES.index((5, 2, 8, 2200, 0))] = (5, 2, 8, 330, 0)


def operands(rows, heads, width, slots, dtype=torch.float32, seed=0):
    """query, memory_key, memory_value and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, width), (slots, heads, width), (slots, heads, width))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (*shapes, shapes[0])
    ]


def scores_of(query, key, scale):
    return torch.matmul(query.transpose(0, 1), key.permute(1, 2, 0)).transpose(0, 1) * scale


def best(scores, topk):
    """The topk largest, ties to the lower slot, ascending by slot: (R, H, K) int64."""
    order = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :topk].sort(-1).values


def evaluate(query, key, value, kept, scale, dropout_p):
    """Memory attention over the slots `kept` (R, H, K), every operation in the operands' dtype."""
    head = torch.arange(query.shape[1]).view(1, -1, 1)
    weights = scores_of(query, key, scale).gather(-1, kept).softmax(-1)
    if dropout_p:
        weights = weights * memory_dropout_keep(SEED, dropout_p, kept) / (1 - dropout_p)
    return torch.einsum("rhk,rhkd->rhd", weights, value[kept, head])


def with_gradients(function, tensors, grad_output):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def run(tensors, topk, *, scale=0.3, dropout_p=0.0, need=(True, True, True)):
    """Forward and backward by the operators themselves: output, indices, three gradients."""
    *inputs, grad_output = tensors
    output, logsumexp, indices = forward(*inputs, topk, scale, dropout_p, SEED)
    saved = (*inputs, output, logsumexp, indices)
    return output, indices, *backward(grad_output, *saved, scale, dropout_p, SEED, *need)


@cpu_only
def test_the_library_serves_the_operator():
    assert "memory_attention" in COMPILED["cpu"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_that_of_eager(dtype, shape, dropout_p):
    """Twice eager's in the same dtype on the same slots for the output, three times for gradients.

    Eager's is the largest over a few orders of the slots, which the definition does not depend on:
    in one order alone its sums may happen to be nearly exact.
    float64, whose eager evaluation is the truth itself, is held to eager's float32 error times the
    ratio of their roundings. The truth's own error is allowed for, and one rounding of the largest
    element in that dtype: where eager happens to be exact, a result rounded once more passes.
    """
    *size, topk = shape
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    tensors = operands(*size, dtype=eager_dtype)  # exact in float64 too
    scores = scores_of(*(t.double() for t in tensors[:2]), 0.3)
    kept = best(scores, topk or size[3])

    def evaluated(as_dtype, slots=kept):
        *inputs, grad_output = (t.to(as_dtype) for t in tensors)
        return with_gradients(lambda *t: evaluate(*t, slots, 0.3, dropout_p), inputs, grad_output)

    *inputs, grad_output = (t.to(dtype) for t in tensors)
    output, indices, *gradients = run((*inputs, grad_output.to(dtype)), topk, dropout_p=dropout_p)
    ours = (output, *gradients)
    _, logsumexp, _ = forward(*inputs, topk, 0.3, dropout_p, SEED)
    assert indices.dtype == torch.int32 and indices.shape == (*size[:2], topk)
    if topk:
        assert torch.equal(indices.long(), kept)

    truth, turned = evaluated(torch.float64), evaluated(torch.float64, kept.flip(-1))
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(kept.shape[-1], generator=generator) for _ in range(4)]
    eager = [evaluated(eager_dtype, kept[..., order]) for order in orders]
    held = [*zip(NAMES, (2, 3, 3, 3), ours, zip(*eager, strict=True), truth, turned, strict=True)]
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    plain = scores_of(*(t.float() for t in tensors[:2]), 0.3).gather(-1, kept).logsumexp(-1)
    exact = scores.gather(-1, kept).logsumexp(-1)
    held.append(("logsumexp", 2, logsumexp, [plain], exact, exact))
    for name, factor, got, plain, wanted, other_order in held:
        kind = statistics if name == "logsumexp" else dtype
        assert got.dtype == kind and got.shape == wanted.shape and got.is_contiguous(), name
        unit = torch.finfo(kind).eps
        error = max(largest(each - wanted) for each in plain)
        allowed = factor * error * unit / torch.finfo(plain[0].dtype).eps
        allowed += largest(other_order - wanted) + unit * largest(wanted)
        assert largest(got - wanted) <= allowed, f"{name}: {largest(got - wanted)} > {allowed}"


def largest(tensor):
    return tensor.abs().max().item()


@pytest.mark.parametrize(
    "dtype", [d for d in (torch.float32, torch.bfloat16) if d in DTYPES], ids=str
)
def test_one_slot(dtype):
    """The output is the slot's value; the gradient of the score, a difference of equals, is 0.

    Three TF32 products keep 22 bits of a float32 value on a GPU.
    """
    query, key, value, grad = operands(3, 2, 8, 1, dtype=dtype)
    output, _, grad_query, grad_key, grad_value = run((query, key, value, grad), 0)
    exact = BACKEND == "cpu" or INTERPRETED or dtype == torch.bfloat16
    lost = 0 if exact else 2**-21
    torch.testing.assert_close(output, value.expand(3, -1, -1), rtol=lost, atol=0)
    # 8 products summed twice in different order, times the scale of 0.3, summed over 3 rows.
    rounding = 8 * torch.finfo(torch.float32).eps * (grad * value).abs().sum(-1).max()
    assert grad_query.abs().max() <= rounding * key.abs().max()
    assert grad_key.abs().max() <= rounding * query.abs().max()
    torch.testing.assert_close(grad_value, grad.float().sum(0, keepdim=True).to(dtype))


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e5])
@cpu_only
def test_the_only_slot_has_all_the_weight(size):
    """A score in the backward is the forward's to the last bit: at 1e8 the next one is e^8 more."""
    query, key, value, grad = operands(1, 2, 24, 1)
    *_, grad_value = run((size * query, size * key, value, grad), 0)
    assert torch.equal(grad_value, grad)


# Scores that are small integers, so that products are exact and equal scores are ties.
TRAPS = {
    "constant": lambda n: torch.ones(n),
    "ascending": lambda n: torch.arange(n).float(),
    "descending": lambda n: -torch.arange(n).float(),
    "sawtooth": lambda n: (torch.arange(n) % 7).float(),
    "duplicates": lambda n: torch.randint(-3, 4, (n,)).float(),
    "one large": lambda n: torch.where(torch.arange(n) == n // 2, 1e30, -1e30),
    "zeros of both signs": lambda n: torch.where(torch.arange(n) % 3 == 0, -0.0, 0.0),
    "negative zeros first": lambda n: torch.where(torch.arange(n) < n // 2, -0.0, 0.0),
    "minus infinity": lambda n: torch.where(torch.arange(n) % 5 == 0, 1.0, -torch.inf),
    "all minus infinity": lambda n: torch.full((n,), -torch.inf),
    "infinity": lambda n: torch.where(torch.arange(n) % 5 == 0, torch.inf, 1.0),
    "NaN": lambda n: torch.where(torch.arange(n) % 50 == 7, torch.nan, torch.arange(n).float()),
    "denormal": lambda n: torch.arange(n).float() * 1e-45,
}


@pytest.mark.parametrize("topk", [3, 63] if INTERPRETED else [1, 3, 32, 63])
@pytest.mark.parametrize("slots", [64, 300] if INTERPRETED else [64, 2048, 4099])
@pytest.mark.parametrize("trap", TRAPS)
def test_ties_and_extremes_select_as_a_stable_sort(trap, slots, topk):
    torch.manual_seed(0)
    row = TRAPS[trap](slots)
    key = row.view(slots, 1, 1)
    query = torch.ones(2, 1, 1)
    _, _, indices = forward(query, key, torch.zeros_like(key), topk, 1.0, 0.0, None)
    expected = best(row.expand(2, 1, slots), topk)
    assert torch.equal(indices.long(), expected)


@pytest.mark.parametrize("topk", [0, 20])
@pytest.mark.parametrize("trap", TRAPS)
def test_extreme_scores_are_weighted_as_by_softmax(trap, topk):
    torch.manual_seed(0)
    scores = TRAPS[trap](600)
    value = torch.randn(600, 1, 4)
    output, logsumexp, _ = forward(
        torch.ones(3, 1, 1), scores.view(-1, 1, 1), value[..., :1], topk, 1.0, 0.0, None
    )
    kept = best(scores.view(1, 1, -1), topk or 600).flatten()
    weights = scores[kept].double().softmax(-1)
    expected = (weights * value[kept, 0, 0].double()).sum()
    torch.testing.assert_close(
        output.double(), expected.expand(3, 1, 1), equal_nan=True, rtol=1e-5, atol=1e-6
    )
    if not torch.isnan(expected):
        torch.testing.assert_close(logsumexp[0, 0].double(), scores[kept].double().logsumexp(-1))


@pytest.mark.parametrize("topk", [0, 5])
def test_nan_in_a_query_row_stays_in_its_row_and_is_not_hidden(topk):
    rows, slots = (20, 140) if INTERPRETED else (60, 300)
    query, key, value, grad = operands(rows, 2, 8, slots)
    query[rows // 2, 1, 2] = torch.nan
    output, indices, grad_query, grad_key, grad_value = run((query, key, value, grad), topk)
    for tensor in (output, grad_query):
        assert tensor[rows // 2, 1].isnan().all()
        tensor[rows // 2, 1] = 0
        assert tensor.isfinite().all()
    reached = torch.zeros(slots, 2, dtype=torch.bool)
    reached[:, 1] = True
    if topk:
        reached[:, 1] = False
        reached[indices[rows // 2, 1].long(), 1] = True
    for tensor in (grad_key, grad_value):
        assert tensor[reached].isnan().all()
        assert tensor[~reached].isfinite().all()


@pytest.mark.parametrize("topk", [0, 5])
def test_nan_in_a_slot_reaches_every_row_of_its_head(topk):
    query, key, value, grad = operands(10, 2, 8, 300)
    key[299, 0, 3] = torch.nan
    output, indices, grad_query, _, _ = run((query, key, value, grad), topk)
    assert output[:, 0].isnan().all() and grad_query[:, 0].isnan().all()
    assert output[:, 1].isfinite().all() and grad_query[:, 1].isfinite().all()
    if topk:
        assert (indices[:, 0] == 299).any(-1).all()


@pytest.mark.parametrize("topk", [0, 5])
def test_no_rows(topk):
    output, indices, *gradients = run(operands(0, 2, 8, 30), topk)
    assert output.shape == (0, 2, 8) and indices.shape == (0, 2, topk)
    assert gradients[0].shape == (0, 2, 8)
    for gradient in gradients[1:]:
        assert torch.equal(gradient, torch.zeros(30, 2, 8))


LAYOUTS = {
    "transposed heads": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other column": lambda t: torch.stack((t, t), -1)[..., 0],
    "columns first": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "a slice": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
}


@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout, topk):
    tensors = operands(9, 3, 6, 17) if INTERPRETED else operands(30, 3, 6, 40)
    laid_out = [LAYOUTS[layout](t) for t in tensors]
    assert not any(t.is_contiguous() for t in laid_out)
    for a, b in zip(run(laid_out, topk), run(tensors, topk), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("topk", [0, 5])
def test_expanded_operands(topk):
    query, key, value, grad = operands(1, 2, 8, 1)
    expanded = [query.expand(9, -1, -1), *(t.expand(20, -1, -1) for t in (key, value))]
    expanded.append(grad.expand(9, -1, -1))
    for a, b in zip(
        run(expanded, topk), run([t.contiguous() for t in expanded], topk), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("topk", [0, 5])
def test_each_combination_of_needed_gradients(topk, dropout_p):
    tensors = operands(9, 1, 8, 17) if INTERPRETED else operands(30, 2, 8, 40)
    _, _, *whole = run(tensors, topk, dropout_p=dropout_p)
    for need in itertools.product((False, True), repeat=3):
        _, _, *some = run(tensors, topk, dropout_p=dropout_p, need=need)
        for gradient, wanted, all_of_them in zip(some, need, whole, strict=True):
            assert torch.equal(gradient, all_of_them if wanted else torch.empty(0))


@pytest.mark.parametrize("topk", [0, 11])
def test_dropout_draws_the_reference_mask(topk):
    """With unit vectors as values the output is the weights themselves."""
    rows, heads, slots, p = 53, 3, 37, 0.4
    query, key, _, _ = operands(rows, heads, slots, slots)
    value = torch.eye(slots).unsqueeze(1).expand(-1, heads, -1)
    kept_weights, _, indices = forward(query, key, value, topk, 0.1, 0.0, None)
    weights, _, same = forward(query, key, value, topk, 0.1, p, SEED)
    assert torch.equal(indices, same)
    numbers = torch.arange(slots).expand(rows, heads, -1)
    keep = memory_dropout_keep(SEED, p, numbers)
    assert torch.equal(weights != 0, keep & (kept_weights != 0))
    torch.testing.assert_close(weights, keep * kept_weights / (1 - p))


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton kernels alone")
def test_work_in_pieces_gives_the_same(monkeypatch):
    tensors = operands(9, 3, 8, 17)
    whole = run(tensors, 5, dropout_p=0.3)
    monkeypatch.setattr("mpma_ext.kernels.memory_attention.CANDIDATE_ROWS", 12)
    monkeypatch.setattr("mpma_ext.kernels.memory_attention_topk_backward.ENTRIES", 90)
    for piecewise, at_once in zip(run(tensors, 5, dropout_p=0.3), whole, strict=True):
        torch.testing.assert_close(piecewise, at_once)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("topk", [0, 9])
@cpu_only
def test_same_bits_for_any_number_of_threads_and_every_run(topk, dropout_p):
    tensors = operands(101, 3, 16, 700)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            runs.append(run(tensors, topk, dropout_p=dropout_p))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("topk", [0, 1, 4])
@cpu_only
def test_gradcheck(topk, dropout_p):
    *inputs, _ = operands(4, 2, 3, 9, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda *t: forward(*t, topk, 0.7, dropout_p, SEED)[0], leaves, fast_mode=False
    )


@cpu_only
def test_operands_that_do_not_fit_are_refused():
    query, key, value, grad = operands(4, 2, 8, 10)
    with pytest.raises(RuntimeError, match="memory_key"):
        forward(query, key[:, :1], value, 0, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="memory_value"):
        forward(query, key, value[:9], 0, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="topk"):
        forward(query, key, value, 10, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="dropout_seed"):
        forward(query, key, value, 3, 1.0, 0.5, None)
    output, logsumexp, indices = forward(query, key, value, 3, 1.0, 0.0, None)
    saved = (query, key, value, output, logsumexp)
    for wrong in (indices + 10, indices - 10):
        with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 10\)"):
            backward(grad, *saved, wrong, 1.0, 0.0, None, True, True, True)
