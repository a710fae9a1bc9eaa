"""The compiled CPU kernels of token-patch similarity, called as torch.ops.mpma.*.

An error is measured against the definition in float64 and may be twice (gradients: three times)
that of the same formula written in eager PyTorch in the kernel's own dtype. The floor is what one
rounding of the largest value costs in the dtype of the result, for where eager happens to be exact;
64 of them in float64, where the definition has no more digits than what it judges.
"""

import pytest
import torch
from kernels_under_test import BACKEND, DTYPES, INTERPRETED, OPS, cpu_only

from mpma_ext import reference

TEMPERATURES = (4.0, 5.0)
# reports, tokens, images, patches, width
SHAPES = {
    "one of everything": (1, 1, 1, 1, 3),
    "nothing a multiple of a vector": (3, 13, 2, 19, 21),
    "the model's own": (2, 24, 3, 49, 128),
    "whole tiles": (2, 12, 2, 32, 64),
    "many patches, narrow: no Gram matrix": (2, 9, 3, 50, 12),
    "rows far apart": (3, 5, 2, 7, 512),
    "rows far apart, nothing a multiple of a vector": (2, 3, 2, 9, 521),
}


def inputs(shape, dtype=torch.float32, *, masked=True, seed=0):
    """Tokens, patches, masks (ragged, each with something real) and scores that spread."""
    reports, t, images, p, width = shape
    generator = torch.Generator().manual_seed(seed)

    def features(*size):
        return (torch.randn(size, generator=generator) * 1.5 * width**-0.25).to(dtype)

    def mask(*size):
        real = torch.rand(size, generator=generator) < 0.7
        real[:, torch.randint(size[1], (1,), generator=generator)] = True
        return real if masked else None

    return (
        features(reports, t, width),
        features(images, p, width),
        mask(reports, t),
        mask(images, p),
    )


def weights(*size, dtype=torch.float32):
    """Gradients of an output, of both signs."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def in_eager(tokens, patches, token_mask, patch_mask, attention=4.0, pooling=5.0):
    """The softmax form with c written out, every step in the dtype of the inputs."""
    token, patch = token_mask[:, None, :, None], patch_mask[None, :, None, :]
    scores = torch.einsum("jtd,ipd->jitp", tokens, patches)
    a = scores.masked_fill(~token, -torch.inf).softmax(2)
    b = (attention * a).masked_fill(~patch, -torch.inf).softmax(3)
    c = torch.einsum("jitp,ipd->jitd", b, patches)
    cosine = torch.cosine_similarity(tokens[:, None], c, dim=3, eps=1e-8)
    return (pooling * cosine).masked_fill(~token[..., 0], -torch.inf).logsumexp(2)


def max_in_eager(tokens, patches, token_mask, patch_mask):
    token, patch = token_mask[:, None, :, None], patch_mask[None, :, None, :]
    scores = torch.einsum("jtd,ipd->jitp", tokens, patches)
    of_token = scores.masked_fill(~patch, -torch.inf).amax(3).masked_fill(~token[..., 0], 0)
    of_patch = scores.masked_fill(~token, -torch.inf).amax(2).masked_fill(~patch[:, :, 0], 0)
    return (
        of_token.sum(2) / token_mask.sum(1)[:, None],
        of_patch.sum(2) / patch_mask.sum(1)[None],
    )


def softmax_form(tokens, patches, token_mask, patch_mask, temperatures=TEMPERATURES, grad=None):
    """Output, gradient of tokens, gradient of patches."""
    operands = (tokens, patches, token_mask, patch_mask, *temperatures)
    out = OPS.token_patch_similarity(*operands)
    grad = weights(*out.shape, dtype=out.dtype) if grad is None else grad
    return out, *OPS.token_patch_similarity_backward(grad, *operands, True, True)


def max_form(tokens, patches, token_mask, patch_mask):
    """Both outputs, gradient of tokens, gradient of patches."""
    operands = (tokens, patches, token_mask, patch_mask)
    *outs, patch_index, token_index = OPS.token_patch_max_similarity(*operands)
    grads = [weights(*out.shape, dtype=out.dtype) * k for k, out in enumerate(outs, 1)]
    saved = (patch_index, token_index)
    return *outs, *OPS.token_patch_max_similarity_backward(*grads, *operands, *saved, True, True)


def by_autograd(function, tokens, patches, *rest):
    """The same tuple from a differentiable function."""
    tokens, patches = tokens.clone().requires_grad_(), patches.clone().requires_grad_()
    outs = function(tokens, patches, *rest)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [weights(*out.shape, dtype=out.dtype) * k for k, out in enumerate(outs, 1)]
    grads = torch.autograd.grad(outs, (tokens, patches), grads)
    return *(out.detach() for out in outs), *grads


def defined(function, tokens, patches, token_mask=None, patch_mask=None):
    """What the definition gives in float64."""

    def with_masks(tokens, patches):
        return function(tokens, patches, token_mask=token_mask, patch_mask=patch_mask)

    return by_autograd(with_masks, tokens.double(), patches.double())


def assert_close_as_eager(got, eager, exact):
    for number, (ours, theirs, true) in enumerate(zip(got, eager, exact, strict=True)):
        factor = 2 if number < len(got) - 2 else 3
        roundings = 64 if ours.dtype == torch.float64 else 1
        floor = roundings * torch.finfo(ours.dtype).eps * max(true.abs().max().item(), 1.0)
        error = (ours.double() - true).abs().max().item()
        allowed = factor * (theirs.double() - true).abs().max().item() + floor
        assert error <= allowed, f"result {number}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


FORMS = pytest.mark.parametrize("form", [softmax_form, max_form])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_softmax_form_is_as_accurate_as_eager(shape, dtype):
    operands = inputs(shape, dtype)
    got = softmax_form(*operands)
    assert got[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == got[2].dtype == dtype
    exact = defined(reference.token_patch_similarity, *operands)
    assert_close_as_eager(got, by_autograd(in_eager, *operands), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_max_form_is_as_accurate_as_eager(shape, dtype):
    operands = inputs(shape, dtype)
    got = max_form(*operands)
    assert got[0].dtype == got[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert got[2].dtype == got[3].dtype == dtype
    exact = defined(reference.token_patch_max_similarity, *operands)
    assert_close_as_eager(got, by_autograd(max_in_eager, *operands), exact)


# More scores than the backward holds at a time, on the CPU 2^20 an image, elsewhere fewer; with and
# without the Gram matrix.
MANY = [(60, 90, 1, 200, 101), (30, 60, 1, 700, 4)]
if BACKEND == "emulated":
    MANY = [(3, *shape[1:]) for shape in MANY]


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_reports(shape, monkeypatch):
    if INTERPRETED:
        shape = (9, 12, 3, 20, 11) if shape[-1] == 101 else (9, 12, 3, 20, 4)
        monkeypatch.setattr("mpma_ext.kernels.token_patch_similarity_backward.WORKSPACE", 2**15)
    tokens, patches, *_ = inputs(shape, masked=False)
    ones = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (tokens, patches)]
    operands = (tokens, patches, *ones)
    exact = defined(reference.token_patch_similarity, *operands)
    assert_close_as_eager(softmax_form(*operands), by_autograd(in_eager, *operands), exact)


@FORMS
@pytest.mark.parametrize("shape", [SHAPES["the model's own"], (2, 9, 3, 50, 12)], ids=str)
def test_without_masks_equals_masks_of_ones(form, shape):
    tokens, patches, *_ = inputs(shape, masked=False)
    ones = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (tokens, patches)]
    assert_same_bits(form(tokens, patches, None, None), form(tokens, patches, *ones))


@FORMS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_masked_has_no_effect_and_no_gradient(form, poison):
    tokens, patches, token_mask, patch_mask = inputs((3, 13, 2, 19, 21))
    clean = form(tokens, patches, token_mask, patch_mask)
    tokens[~token_mask], patches[~patch_mask] = poison, poison
    poisoned = form(tokens, patches, token_mask, patch_mask)
    assert_same_bits(poisoned, clean)
    *_, grad_tokens, grad_patches = poisoned
    assert grad_tokens[~token_mask].eq(0).all()
    assert grad_patches[~patch_mask].eq(0).all()
    assert grad_tokens[token_mask].abs().sum() > 0


@FORMS
def test_a_side_with_nothing_real_gives_zero_and_no_gradient(form):
    tokens, patches, token_mask, patch_mask = inputs((3, 13, 3, 19, 21))
    rest = form(tokens, patches, token_mask, patch_mask)
    token_mask[1], patch_mask[2] = False, False
    *outs, grad_tokens, grad_patches = form(tokens, patches, token_mask, patch_mask)
    for out, before in zip(outs, rest, strict=False):
        assert out[1].eq(0).all()
        assert out[:, 2].eq(0).all()
        assert torch.equal(out[::2, :2], before[::2, :2])
    assert grad_tokens[1].eq(0).all()
    assert grad_patches[2].eq(0).all()


@FORMS
@pytest.mark.parametrize("empty", range(5), ids=["reports", "tokens", "images", "patches", "width"])
def test_empty_sizes(form, empty):
    shape = [2, 3, 4, 5, 6]
    shape[empty] = 0
    reports, t, images, p, width = shape
    operands = (torch.randn(reports, t, width), torch.randn(images, p, width), None, None)
    *outs, grad_tokens, grad_patches = form(*operands)
    for out, exact in zip(outs, defined(DEFINITION[form], *operands), strict=False):
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)
    assert grad_tokens.eq(0).all() and grad_tokens.shape == operands[0].shape
    assert grad_patches.eq(0).all() and grad_patches.shape == operands[1].shape


DEFINITION = {
    softmax_form: reference.token_patch_similarity,
    max_form: reference.token_patch_max_similarity,
}


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(form, dtype):
    tokens, patches, token_mask, patch_mask = inputs((2, 13, 3, 19, 21), dtype)
    expected = form(tokens, patches, token_mask, patch_mask)
    permuted = form(
        tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        patches.flip(1).transpose(0, 1).contiguous().transpose(0, 1).flip(1),
        token_mask.T.contiguous().T,
        patch_mask.repeat_interleave(2, 1)[:, ::2],
    )
    assert_same_bits(permuted, expected)
    assert all(result.is_contiguous() for result in permuted)
    expanded = (tokens[:1].expand(3, -1, -1), patches[..., :1].expand(-1, -1, 21))
    masks = (token_mask[:1].expand(3, -1), patch_mask)
    copies = [x.contiguous() for x in (*expanded, *masks)]
    assert_same_bits(form(*expanded, *masks), form(*copies))


def test_an_expanded_gradient_of_the_output():
    operands = inputs((3, 13, 2, 19, 21))
    one = torch.tensor(0.5)
    assert_same_bits(
        softmax_form(*operands, grad=one.expand(3, 2)),
        softmax_form(*operands, grad=torch.full((3, 2), 0.5)),
    )


@FORMS
# Enough work for two threads, with more images than one thread takes at a time.
@pytest.mark.parametrize("shape", [(5, 33, 7, 49, 64), (9, 40, 5, 50, 12)], ids=str)
@cpu_only
def test_the_bits_do_not_depend_on_the_number_of_threads(form, shape):
    operands = inputs(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = form(*operands)
        torch.set_num_threads(2)
        assert_same_bits(form(*operands), alone)
    finally:
        torch.set_num_threads(before)


@FORMS
def test_only_wanted_gradients(form):
    tokens, patches, token_mask, patch_mask = inputs((3, 13, 2, 19, 21))
    operands = (tokens, patches, token_mask, patch_mask)
    if form is softmax_form:
        expected = form(*operands)[1:]
        backward = OPS.token_patch_similarity_backward
        arguments = (weights(3, 2), *operands, *TEMPERATURES)
    else:
        expected = form(*operands)[2:]
        backward = OPS.token_patch_max_similarity_backward
        saved = OPS.token_patch_max_similarity(*operands)[2:]
        arguments = (weights(3, 2), 2 * weights(3, 2), *operands, *saved)
    for wanted in ((True, False), (False, True), (False, False)):
        for grad, want, whole in zip(backward(*arguments, *wanted), wanted, expected, strict=True):
            assert torch.equal(grad, whole) if want else grad.shape == (0,)


class WithBackward(torch.autograd.Function):
    """The pair of kernels as one differentiable function, for gradcheck."""

    @staticmethod
    def forward(ctx, *operands):
        ctx.operands = operands
        return OPS.token_patch_similarity(*operands)

    @staticmethod
    def backward(ctx, grad):
        grads = OPS.token_patch_similarity_backward(grad, *ctx.operands, True, True)
        return *grads, None, None, None, None


# The second has more than twice as many patches as features: |c|² without the Gram matrix.
@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 6), (2, 3, 2, 8, 3)], ids=str)
@pytest.mark.parametrize("temperatures", [(4.0, 5.0), (-1.5, 0.5)], ids=str)
@cpu_only
def test_gradcheck(shape, temperatures):
    tokens, patches, *masks = inputs(shape, torch.float64)
    features = (tokens.requires_grad_(), patches.requires_grad_())
    assert torch.autograd.gradcheck(WithBackward.apply, (*features, *masks, *temperatures))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize >= 4], ids=str)
def test_norms_below_the_clamp(dtype):
    tokens, patches, *masks = inputs((2, 4, 3, 5, 6), dtype)
    tokens[0, 1], tokens[1], patches[1] = 0, 1e-12, 0
    got = softmax_form(tokens, patches, *masks)
    exact = defined(reference.token_patch_similarity, tokens, patches, *masks)
    for ours, true in zip(got, exact, strict=True):
        scale = true.abs().max().item()  # a zero token's gradient is 1e8 times the others'
        torch.testing.assert_close(
            ours.double(), true, rtol=0, atol=20 * torch.finfo(dtype).eps * scale
        )


@pytest.mark.parametrize("attention_temperature", [500.0, -500.0, 0.0])
def test_large_scores_and_temperatures_do_not_overflow(attention_temperature):
    tokens, patches, *masks = inputs((2, 13, 3, 19, 21))
    tokens, patches = tokens * 30, patches * 30
    arguments = (tokens, patches, *masks)
    out = OPS.token_patch_similarity(*arguments, attention_temperature, 300.0)
    exact = reference.token_patch_similarity(
        tokens.double(),
        patches.double(),
        token_mask=masks[0],
        patch_mask=masks[1],
        attention_temperature=attention_temperature,
        pooling_temperature=300.0,
    )
    eager = in_eager(*arguments, attention_temperature, 300.0)
    assert_close_as_eager(
        (out, *[torch.zeros(1)] * 2), (eager, *[torch.zeros(1)] * 2), (exact, *[torch.zeros(1)] * 2)
    )


@FORMS
def test_a_nan_stays_within_its_own_report_and_image(form):
    tokens, patches, token_mask, patch_mask = inputs((3, 13, 3, 19, 21))
    clean = form(tokens, patches, token_mask, patch_mask)
    tokens[1, token_mask[1].nonzero()[-1]] = torch.nan
    got = form(tokens, patches, token_mask, patch_mask)
    for out, before in zip(got[:-2], clean, strict=False):
        assert out[1].isnan().all()
        assert torch.equal(out[::2], before[::2])
    *_, grad_tokens, grad_patches = got
    assert torch.equal(grad_tokens[::2], clean[-2][::2])
    assert grad_patches.isnan().any(2).any(1).all()  # every image meets the report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_products_the_lowest_index_gets_the_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(-1, 2, (3, 37, 4), generator=generator).to(dtype)
    patches = torch.randint(-1, 2, (2, 41, 4), generator=generator).to(dtype)
    _, _, token_mask, patch_mask = inputs((3, 37, 2, 41, 4))
    patch_index, token_index = OPS.token_patch_max_similarity(
        tokens, patches, token_mask, patch_mask
    )[2:]
    assert patch_index.dtype == token_index.dtype == torch.int32
    scores = torch.einsum("jtd,ipd->jitp", tokens.double(), patches.double())
    hidden = ~(token_mask[:, None, :, None] & patch_mask[None, :, None, :])
    scores = scores.masked_fill(hidden, -torch.inf)
    for index, dim, mask in ((patch_index, 3, token_mask[:, None]), (token_index, 2, patch_mask)):
        # argmax of PyTorch promises no order of ties: the first position equal to the maximum.
        best = scores == scores.amax(dim, keepdim=True)
        first = best.to(torch.uint8).cumsum(dim).eq(0).sum(dim)
        mask = mask.expand(first.shape)
        assert best.sum(dim)[mask].gt(1).any()
        assert torch.equal(index.long()[mask], first[mask])
    # Integers a maximum, so that every product and every sum is exact in every dtype.
    each = [torch.randint(-2, 3, (3, 2), generator=generator).float() for _ in range(2)]
    grads = [each[0] * token_mask.sum(1)[:, None], each[1] * patch_mask.sum(1)]
    operands = (tokens, patches, token_mask, patch_mask)
    got = OPS.token_patch_max_similarity_backward(
        *(g.to(torch.float64 if dtype == torch.float64 else torch.float32) for g in grads),
        *(*operands, patch_index, token_index, True, True),
    )
    leaves = [x.double().requires_grad_() for x in (tokens, patches)]
    outs = reference.token_patch_max_similarity(
        *leaves, token_mask=token_mask, patch_mask=patch_mask
    )
    exact = torch.autograd.grad(outs, leaves, [g.double() for g in grads])
    for ours, true in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=1e-9)
