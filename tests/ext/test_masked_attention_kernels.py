"""The compiled CPU kernels of masked attention, called as torch.ops.mpma.*.

An error is measured against the definition in float64 and may be twice (gradients: three times)
that of the same formula written in eager PyTorch in the kernel's own dtype: the largest over a few
orders of queries, keys and widths, as in one order alone its sums may happen to be nearly exact.
The floor is what one rounding of the largest value costs in the dtype of the result; 64 of them in
float64, where the definition has no more digits than what it judges.
"""

import itertools
import math

import pytest
import torch
from kernels_under_test import DTYPES, INTERPRETED, OPS, WIDEST_HEAD, cpu_only

from mpma_ext import reference

INF, NAN = float("inf"), float("nan")
SEVERAL_TILES = 130 if INTERPRETED else 300  # keys
# batch, queries, keys, heads, width
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1),
    "a vision transformer's": (2, 50, 50, 3, 64),
    "several query blocks": (1, 197, 197, 2, 64),
    "nothing a multiple of a vector": (2, 67, 13, 3, 33),
    "several key tiles": (1, 7, 600, 2, 24),
    "one key beyond a tile": (1, 5, 257, 1, 8),
    "wide heads": (1, 9, 11, 1, 130),
}
SHAPES = {name: shape for name, shape in SHAPES.items() if shape[-1] <= WIDEST_HEAD}


def inputs(shape, dtype=torch.float32, seed=0):
    """Query, key, value, a gradient of the output, and a mask that leaves every row a key."""
    batch, queries, keys, heads, width = shape
    generator = torch.Generator().manual_seed(seed)

    def features(rows):
        return torch.randn(batch, rows, heads, width, generator=generator).to(dtype)

    mask = torch.rand(batch, keys, generator=generator) < 0.7
    mask[:, torch.randint(keys, (1,), generator=generator)] = True
    return features(queries), features(keys), features(keys), features(queries), mask


def run(query, key, value, grad, mask=None, scale=None, p=0.0, seed=None, needs=(True,) * 3):
    """Output and the three gradients."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dropout = (p, None if seed is None else torch.tensor([seed]))
    output, logsumexp = OPS.masked_attention(query, key, value, mask, scale, *dropout)
    return output, *OPS.masked_attention_backward(
        grad, query, key, value, output, logsumexp, mask, scale, *dropout, *needs
    )


def definition(query, key, value, grad, dtype=torch.float64, function=None, **settings):
    """The same by autograd through a function, computed in `dtype`."""
    function = function or reference.masked_attention
    operands = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    output = function(*operands, **settings)
    return output.detach(), *torch.autograd.grad(output, operands, grad.to(dtype))


def eager(query, key, value, key_padding_mask=None):
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None], -INF)
    return (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def eager_errors(operands, mask, dtype, orders=4):
    """Of the output and the three gradients: eager's, in its worst of a few orders of all sums."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, width = (operands[0].shape[1], operands[1].shape[1], operands[0].shape[3])
    errors = []
    for _ in range(orders):
        i, j, d = (torch.randperm(n, generator=generator) for n in (queries, keys, width))
        turned = [x[:, r][..., d] for x, r in zip(operands, (i, j, j, i), strict=True)]
        masked = None if mask is None else mask[:, j]
        exact = definition(*turned, key_padding_mask=masked)
        eagerly = definition(*turned, dtype, eager, key_padding_mask=masked)
        errors.append([(e.double() - x).abs().max() for e, x in zip(eagerly, exact, strict=True)])
    return [max(each) for each in zip(*errors, strict=True)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_eager(dtype, shape, masked):
    *operands, mask = inputs(shape, dtype)
    mask = mask if masked else None
    exact = definition(*operands, key_padding_mask=mask)
    errors = eager_errors(operands, mask, dtype)
    names, factors = ("output", "grad_query", "grad_key", "grad_value"), (2, 3, 3, 3)
    got = run(*operands, mask)
    for name, ours, truth, error, factor in zip(names, got, exact, errors, factors, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        roundings = 64 if dtype == torch.float64 else 1
        allowed = factor * error + roundings * torch.finfo(dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= allowed, name


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_scale(scale):
    *operands, mask = inputs((2, 20, 300, 2, 16))
    got = run(*operands, mask, scale)
    exact = definition(*operands, key_padding_mask=mask, scale=scale)
    for ours, truth in zip(got, exact, strict=True):
        # float32, sums of 300 terms with weights up to 1: tens of roundings of the largest value.
        assert (ours - truth).abs().max() <= 64 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_scores_far_apart_across_tiles():
    """The rescaling from tile to tile, when the largest score comes first, last or in between."""
    query = torch.ones(1, 1, 1, 1)
    value = torch.arange(700.0).view(1, 700, 1, 1)
    for peak in (0, 255, 256, 699):
        key = torch.full((1, 700, 1, 1), -200.0)
        key[0, peak] = 200.0
        output, logsumexp = OPS.masked_attention(query, key, value, None, 1.0, 0.0, None)
        assert output.item() == peak
        assert logsumexp.item() == 200.0


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e5])
@cpu_only
def test_the_only_key_has_all_the_weight(size):
    """A score in the backward is the forward's to the last bit: at 1e8 the next one is e^8 more."""
    query, key, value, grad, _ = inputs((3, 1, 1, 2, 24))
    *_, grad_value = run(size * query, size * key, value, grad, scale=0.3)
    assert torch.equal(grad_value, grad)


def test_logsumexp():
    query, key, value, _, mask = inputs((2, 9, 300, 2, 16))
    _, logsumexp = OPS.masked_attention(query, key, value, mask, 0.25, 0.0, None)
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * 0.25
    exact = scores.masked_fill(~mask[:, None, None], -INF).logsumexp(-1)
    torch.testing.assert_close(logsumexp.double(), exact, rtol=1e-6, atol=1e-6)


# ---- masks and NaN ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [NAN, INF, -INF])
def test_masked_keys_have_no_effect(dtype, what):
    query, key, value, grad, mask = inputs((2, 9, 21, 2, 12), dtype)
    hidden = ~mask[:, :, None, None]
    clean = run(query, key.masked_fill(hidden, 0), value.masked_fill(hidden, 0), grad, mask)
    spoilt = run(query, key.masked_fill(hidden, what), value.masked_fill(hidden, what), grad, mask)
    for expected, got in zip(clean, spoilt, strict=True):
        assert torch.equal(expected, got)
    for gradient in spoilt[2:]:
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()


def test_a_row_without_keys_gives_zero_and_no_gradient():
    query, key, value, grad, mask = inputs((3, 6, 10, 2, 8))
    mask[1] = False
    key[1], value[1] = NAN, NAN
    whole = run(query, key, value, grad, mask)
    for result in whole:
        assert (result[1] == 0).all()
    others = [0, 2]
    alone = run(*(x[others] for x in (query, key, value, grad, mask)))
    for result, expected in zip(whole, alone, strict=True):
        assert torch.equal(result[others], expected)
    _, logsumexp = OPS.masked_attention(query, key, value, mask, 1.0, 0.0, None)
    assert (logsumexp[1] == INF).all()


def test_nan_in_a_query_row_stays_there():
    query, key, value, grad, mask = inputs((2, 70, 20, 2, 8))
    clean = run(query, key, value, grad, mask)
    query[0, 3, 1] = NAN
    output, grad_query, grad_key, grad_value = run(query, key, value, grad, mask)
    for result, expected in ((output, clean[0]), (grad_query, clean[1])):
        assert result[0, 3, 1].isnan().all()
        result[0, 3, 1] = expected[0, 3, 1]
        assert torch.equal(result, expected)
    for gradient, expected in ((grad_key, clean[2]), (grad_value, clean[3])):
        assert gradient[0, mask[0], 1].isnan().all()
        assert (gradient[0, ~mask[0], 1] == 0).all()
        assert torch.equal(gradient[:, :, 0], expected[:, :, 0])
        assert torch.equal(gradient[1], expected[1])


def test_a_visible_nan_shows():
    query, key, value, *_ = inputs((1, 4, 300, 1, 8))
    for spoilt in (key, value):
        spoilt[0, 280, 0, 2] = NAN
        output, _ = OPS.masked_attention(query, key, value, None, 1.0, 0.0, None)
        assert output[..., 2].isnan().all()
        spoilt[0, 280, 0, 2] = 0


# ---- strides, threads, instruction sets ---------------------------------------------------------


def test_any_strides():
    query, key, value, grad, mask = inputs((2, 18, 23, 3, 16))
    expected = run(query, key, value, grad, mask)

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_other(x):
        return torch.stack((x, torch.full_like(x, NAN)), -1).flatten(-2)[..., ::2]

    def rows_backwards_in_memory(x):
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    for layout in (heads_first, every_other, rows_backwards_in_memory):
        moved = [layout(x) for x in (query, key, value, grad)]
        assert not moved[0].is_contiguous()
        wide_mask = torch.stack((mask, ~mask), -1)[..., 0]
        for got, wanted in zip(run(*moved, wide_mask), expected, strict=True):
            assert torch.equal(got, wanted)


def test_expanded_inputs():
    query, key, value, grad, mask = inputs((1, 5, 7, 1, 8))
    small = (query, key, value, grad)
    expanded = [x.expand(3, -1, 2, -1) for x in small]
    got = run(*expanded, mask.expand(3, -1))
    wanted = run(*(x.contiguous() for x in expanded), mask.expand(3, -1).contiguous())
    for ours, expected in zip(got, wanted, strict=True):
        assert torch.equal(ours, expected)
    ones = torch.ones(()).expand_as(query)  # the gradient of a sum
    for ours, expected in zip(
        run(query, key, value, ones), run(query, key, value, ones.contiguous()), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cpu_only
def test_same_bits_on_any_number_of_threads(threads):
    *operands, mask = inputs((5, 33, 40, 3, 16), torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(*operands, mask, p=0.3, seed=5))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
@cpu_only
def test_gradcheck(p):
    query, key, value, _, mask = inputs((2, 3, 5, 2, 3), torch.float64)
    mask[1] = False
    seed = torch.tensor([3])
    operands = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *x: OPS.masked_attention(*x, mask, 0.6, p, seed)[0], operands
    )
    qkv = torch.stack((key, value, key * value), 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: OPS.masked_attention_qkvpacked(x, mask, 0.6, p, seed)[0], qkv
    )
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in operands]
    offsets_q, offsets_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 4, 9]))
    assert torch.autograd.gradcheck(
        lambda *x: OPS.masked_attention_varlen(*x, offsets_q, offsets_k, 3, 5, 0.6, p, seed)[0],
        packed,
    )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_needed_gradients(needs):
    keys, heads = SEVERAL_TILES, 1 if INTERPRETED else 2
    query, key, value, grad, mask = inputs((2, 70, keys, heads, 16))
    everything = run(query, key, value, grad, mask)[1:]
    for needed, got, expected in zip(
        needs, run(query, key, value, grad, mask, needs=needs)[1:], everything, strict=True
    ):
        assert torch.equal(got, expected) if needed else got.shape == (0,)
    flat = [x.flatten(0, 1) for x in (query, key, value, grad)]
    offsets_q, offsets_k = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 70, 140], [0, 9, keys])
    )
    tail = (offsets_q, offsets_k, 70, keys - 9, 0.25, 0.0, None)
    output, logsumexp = OPS.masked_attention_varlen(*flat[:3], *tail)
    saved = (flat[3], *flat[:3], output, logsumexp, *tail)
    everything = OPS.masked_attention_varlen_backward(*saved, True, True, True)
    some = OPS.masked_attention_varlen_backward(*saved, *needs)
    for needed, got, expected in zip(needs, some, everything, strict=True):
        assert torch.equal(got, expected) if needed else got.shape == (0,)


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3])
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_drops_what_the_definition_drops(seed, masked):
    keys = 200 if INTERPRETED else 530
    *operands, mask = inputs((2, 6, keys, 2, 8))
    mask[1, : keys * 3 // 5] = False  # a tile that starts in the middle of the keys
    mask = mask if masked else None
    got = run(*operands, mask, p=0.4, seed=seed)
    exact = definition(*operands, key_padding_mask=mask, dropout_p=0.4, dropout_seed=seed)
    for ours, truth in zip(got, exact, strict=True):
        # One weight of so many dropped or kept wrongly would be an error of 1e-2.
        assert (ours - truth).abs().max() <= 64 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_dropout_rate():
    query, key = torch.zeros(1, 64, 2, 4), torch.zeros(1, 256, 2, 4)
    value = torch.ones(1, 256, 2, 4)
    kept = OPS.masked_attention(query, key, value, None, 1.0, 0.25, torch.tensor([1]))[0][..., 0]
    # The mean of 64 * 2 * 256 independent weights of variance p / (1 - p).
    assert abs(kept.mean().item() - 1) < 5 * math.sqrt(0.25 / 0.75 / kept.numel() / 256)
    # Rows and heads draw independently; the deviation of 128 values is known to 6 %.
    assert abs(kept.std().item() / math.sqrt(0.25 / 0.75 / 256) - 1) < 0.25


# ---- the three forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_padded(dtype, p):
    lengths_q, lengths_k = [5, 0, 70, 1, 8], [7, 3, SEVERAL_TILES, 0, 1]
    query, key, value, grad, _ = inputs((5, 70, SEVERAL_TILES, 2, 12), dtype)
    inside_q = torch.arange(70) < torch.tensor(lengths_q)[:, None]
    inside_k = torch.arange(SEVERAL_TILES) < torch.tensor(lengths_k)[:, None]
    grad = grad * inside_q[:, :, None, None]
    padded = run(query, key, value, grad, inside_k, 0.3, p, 11)

    extra = torch.full((4, 2, 12), NAN, dtype=dtype)  # rows of no sequence
    packed = [
        torch.cat((x[inside], extra))
        for x, inside in zip(
            (query, key, value, grad), (inside_q, inside_k, inside_k, inside_q), strict=True
        )
    ]
    offsets = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    tail = (*offsets, 70, SEVERAL_TILES, 0.3, p, torch.tensor([11]))
    output, logsumexp = OPS.masked_attention_varlen(*packed[:3], *tail)
    assert logsumexp.shape == (2, sum(lengths_q) + 4)
    gradients = OPS.masked_attention_varlen_backward(
        packed[3], *packed[:3], output, logsumexp, *tail, True, True, True
    )
    for got, expected, inside in zip(
        (output, *gradients), padded, (inside_q, inside_q, inside_k, inside_k), strict=True
    ):
        assert torch.equal(got[:-4], expected[inside])
        assert (got[-4:] == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qkvpacked_equals_separate(dtype, p):
    query, key, value, grad, mask = inputs((2, 35, 35, 3, 20), dtype)
    qkv = torch.stack((query, key, value), 2)
    seed = torch.tensor([4])
    expected = run(query, key, value, grad, mask, 0.2, p, 4)
    output, logsumexp = OPS.masked_attention_qkvpacked(qkv, mask, 0.2, p, seed)
    gradient = OPS.masked_attention_qkvpacked_backward(
        grad, qkv, output, logsumexp, mask, 0.2, p, seed
    )
    assert torch.equal(output, expected[0])
    assert torch.equal(gradient, torch.stack(expected[1:], 2))
    moved = qkv.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)
    assert torch.equal(OPS.masked_attention_qkvpacked(moved, mask, 0.2, p, seed)[0], output)


@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 99], [-7, 3, 5], [5, 2, 4], [2**31 - 1, -(2**31), 9], [4, 4, 4], [9]],
    ids=str,
)
def test_wrong_offsets_stay_in_bounds(offsets):
    query, key, value, grad, _ = (x[0] for x in inputs((1, 9, 9, 2, 4)))
    wrong = torch.tensor(offsets, dtype=torch.int32)
    right = torch.linspace(0, 9, len(offsets)).to(torch.int32)
    for offsets_q, offsets_k in ((wrong, right), (right, wrong), (wrong, wrong)):
        tail = (offsets_q, offsets_k, 9, 9, 0.5, 0.2, torch.tensor([1]))
        output, logsumexp = OPS.masked_attention_varlen(query, key, value, *tail)
        gradients = OPS.masked_attention_varlen_backward(
            grad, query, key, value, output, logsumexp, *tail, True, True, True
        )
        # Every row was written, by a sequence or as a row of none.
        for result in (output, *gradients):
            assert result.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(0, 4, 5, 2, 8), (2, 0, 5, 2, 8), (2, 4, 0, 2, 8), (2, 4, 5, 0, 8)]
)
def test_empty(shape):
    batch, queries, keys, heads, width = shape
    query, grad = torch.randn(2, batch, queries, heads, width)
    key, value = torch.randn(2, batch, keys, heads, width)
    for mask in (None, torch.ones(batch, keys, dtype=torch.bool)):
        output, grad_query, grad_key, grad_value = run(query, key, value, grad, mask)
        for result, like in ((output, query), (grad_query, query), (grad_key, key)):
            assert result.shape == like.shape and (result == 0).all()
        assert grad_value.shape == value.shape and (grad_value == 0).all()


def test_no_sequences():
    rows = torch.randn(3, 2, 4)
    none = torch.zeros(1, dtype=torch.int32)
    output, logsumexp = OPS.masked_attention_varlen(
        rows, rows, rows, none, none, 0, 0, 1.0, 0.0, None
    )
    assert (output == 0).all() and (logsumexp == INF).all()


@cpu_only
def test_what_does_not_fit_is_refused():
    query, key, value, *_ = inputs((2, 4, 5, 2, 8))
    for bad in (
        (query, key[:, :4], value, None),
        (query, key, value.double(), None),
        (query, key[..., :4], value[..., :4], None),
        (query[0], key, value, None),
        (query, key, value, torch.ones(2, 4, dtype=torch.bool)),
        (query, key, value, torch.ones(2, 5)),
        (query.int(), key.int(), value.int(), None),
    ):
        with pytest.raises(RuntimeError, match=r"expected|does not fit"):
            OPS.masked_attention(*bad, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="dropout"):
        OPS.masked_attention(query, key, value, None, 1.0, 0.1, None)
