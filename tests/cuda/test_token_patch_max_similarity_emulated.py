"""The CUDA kernels of the max form on the emulated machine: the traps, and many tiles."""

import pytest
import torch
from emulated_traps import check_traps
from emulation import can_emulate

import mpma_ext  # noqa: F401  registers torch.ops.mpma, which the results are compared with

pytestmark = pytest.mark.skipif(can_emulate() is not None, reason=can_emulate() or "")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# reports, tokens, images, patches, width
SHAPES = {
    "reports of two tiles, images of two of 2 x 56": (2, 150, 1, 115, 20),
    "images of two tiles of 2 x 64, short reports": (3, 5, 1, 200, 36),
    "images of two segments, reports of two": (3, 70, 3, 100, 33),
    "two images a tile, wide": (3, 20, 3, 49, 264),
}


def integers(shape, dtype, seed=0):
    """Operands of small integers: products are exact, and ties many. Ragged masks."""
    reports, t, images, p, width = shape
    generator = torch.Generator().manual_seed(seed)
    tokens, patches = (
        torch.randint(-2, 3, (*size, width), generator=generator).to(dtype)
        for size in ((reports, t), (images, p))
    )
    masks = [torch.rand(x.shape[:2], generator=generator) < 0.8 for x in (tokens, patches)]
    for mask in masks:
        mask[:, -1] = True
    return tokens, patches, *masks


def operators():
    from emulated_ops import token_patch_max_similarity as emulated

    return emulated.token_patch_max_similarity, emulated.token_patch_max_similarity_backward


def test_traps():
    check_traps("test_token_patch_similarity_kernels.py", "-k", "max_form or equal_products")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_many_tiles(shape, dtype):
    forward, backward = operators()
    operands = integers(shape, dtype)
    *means, patch_index, token_index = forward(*operands)
    in_float = [operands[0].float(), operands[1].float(), *operands[2:]]
    *expected, patch, token = torch.ops.mpma.token_patch_max_similarity(*in_float)
    assert torch.equal(patch_index, patch) and torch.equal(token_index, token)
    for ours, theirs in zip(means, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(means[0].shape, generator=generator) for _ in range(2)]
    got = backward(*grads, *operands, patch_index, token_index, True, True)
    expected = torch.ops.mpma.token_patch_max_similarity_backward(
        *grads, *in_float, patch_index, token_index, True, True
    )
    for ours, theirs in zip(got, expected, strict=True):
        # Rounded weights, a rounded result.
        error, allowed = (ours.float() - theirs).abs().max(), 2 * torch.finfo(dtype).eps
        assert error <= allowed * theirs.abs().max()
    again = backward(*grads, *operands, patch_index, token_index, True, True)
    assert all(map(torch.equal, got, again))


def test_without_masks_equals_masks_of_ones():
    forward, backward = operators()
    tokens, patches, *masks = integers((3, 20, 2, 60, 24), torch.bfloat16)
    ones = [torch.ones_like(mask) for mask in masks]
    results = [forward(tokens, patches, *m) for m in ((None, None), ones)]
    assert all(map(torch.equal, *results))
    grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    index = results[0][2:]
    gradients = [
        backward(grad, grad, tokens, patches, *m, *index, True, True) for m in ((None, None), ones)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -3e38])
def test_scores_that_hide(value):
    """Infinite scores, NaN, and scores as low as what marks the hidden."""
    forward, _ = operators()
    tokens, patches, token_mask, patch_mask = integers((2, 70, 2, 70, 1), torch.bfloat16)
    tokens[...], patches[...] = 1, 1
    patches[0], patches[1, 5::3] = value, value
    patches[0, 40:] = 2 * value / 3
    _, to_tokens, patch_index, token_index = forward(tokens, patches, token_mask, patch_mask)
    scores = torch.einsum("jtd,ipd->jitp", tokens.float(), patches.float())
    # A NaN above all, and every real score above the hidden.
    rank = scores.double().nan_to_num(nan=2e300, posinf=1e300, neginf=-1e300)
    token, patch = token_mask[:, None, :, None], patch_mask[None, :, None, :]
    for index, dim, hidden, real in (
        (patch_index, 3, ~patch, token_mask[:, None].expand(2, 2, 70)),
        (token_index, 2, ~token, patch_mask.expand(2, 2, 70)),
    ):
        candidates = rank.masked_fill(hidden, -torch.inf)
        best = candidates == candidates.amax(dim, keepdim=True)
        first = best.to(torch.uint8).cumsum(dim).eq(0).sum(dim)
        assert torch.equal(index.long()[real], first[real])
    of_patch = scores.gather(2, token_index.long()[:, :, None]).squeeze(2)
    mean = of_patch.masked_fill(~patch_mask, 0).sum(2) / patch_mask.sum(1)
    torch.testing.assert_close(to_tokens, mean, rtol=1e-5, atol=0, equal_nan=True)


def test_gradients_too_small_for_half_precision():
    """Weights of about 1e-8, below float16's smallest number, on features of about 1000."""
    forward, backward = operators()
    tokens, patches, *masks = integers((2, 20, 3, 30, 16), torch.float16)
    tokens, patches = 500 * tokens, 500 * patches
    indices = forward(tokens, patches, *masks)[2:]
    grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * 1e-7
    got = backward(grad, grad, tokens, patches, *masks, *indices, True, True)
    expected = torch.ops.mpma.token_patch_max_similarity_backward(
        grad, grad, tokens.float(), patches.float(), *masks, *indices, True, True
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.float() - theirs).abs().max() <= 0.002 * theirs.abs().max() + 6e-8
