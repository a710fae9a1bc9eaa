"""Similarity of every report with every image from their tokens and patches.

The softmax form is GLoRIA's local similarity (Huang et al., ICCV 2021), the max form FILIP's (Yao
et al., ICLR 2022). Both work on a chunk of images at a time and recompute it in the backward, so
that training never holds the scores of all reports, images, tokens and patches at once.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from mpma_ext.reference.precision import compute_dtype, masked_softmax, outside_autocast

NORM_EPSILON = 1e-8
# Scores (images · reports · tokens · patches) held at once: 64 MB in float32.
CHUNK_SCORES = 2**24


@outside_autocast
def token_patch_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    patch_mask: torch.Tensor | None = None,
    attention_temperature: float = 4.0,
    pooling_temperature: float = 5.0,
) -> torch.Tensor:
    """GLoRIA's local similarity of every report j with every image i.

    For token t and patch p:

        a[t,p] = softmax over the real tokens t of ⟨w_t, v_p⟩
        b[t,p] = softmax over the real patches p of attention_temperature · a[t,p]
        c_t    = Σ_p b[t,p] · v_p
        out[j,i] = log Σ_{real t} exp(pooling_temperature · cos(w_t, c_t))

    c_t is never formed: ⟨w_t, c_t⟩ = Σ_p b[t,p] ⟨w_t, v_p⟩ and |c_t|² = bᵀ (V Vᵀ) b.

    Args:
        tokens: (Bt, T, D). token_mask: (Bt, T) bool, True = real.
        patches: (Bi, P, D). patch_mask: (Bi, P) bool, True = real.
        attention_temperature, pooling_temperature: factors of the two exponents.

    Returns:
        (Bt, Bi), float32 (float64 for float64 inputs); 0 where a side has nothing real.
    """

    def of_chunk(w, v, real_token, real_patch):
        scores = _scores(w, v)
        a = masked_softmax(scores, real_token[:, :, None], dim=2)
        b = masked_softmax(attention_temperature * a, real_patch[:, None, None, :], dim=3)
        dot = (b * scores).sum(3)
        gram = v @ v.transpose(1, 2)
        square = (b * (b.flatten(1, 2) @ gram).view_as(b)).sum(3)
        cosine = dot / (_norm((w * w).sum(2)) * _norm(square))
        exponent = (pooling_temperature * cosine).masked_fill(~real_token, -torch.inf)
        nothing = ~(real_token.any(1) & real_patch.any(1)[:, None])
        return (exponent.logsumexp(2).masked_fill(nothing, 0),)

    return _over_images(of_chunk, tokens, patches, token_mask, patch_mask)[0]


@outside_autocast
def token_patch_max_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    patch_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FILIP's similarities of every report with every image, both directions.

    Args:
        tokens: (Bt, T, D). token_mask: (Bt, T) bool, True = real.
        patches: (Bi, P, D). patch_mask: (Bi, P) bool, True = real.

    Returns:
        The mean over real tokens of the maximum over real patches of ⟨w_t, v_p⟩, and the mean over
        real patches of the maximum over real tokens: each (Bt, Bi), float32 (float64 for float64
        inputs); 0 where a side has nothing real. Of equal products the first gets the gradient.
    """

    def of_chunk(w, v, real_token, real_patch):
        scores = _scores(w, v)
        token, patch = real_token[:, :, None], real_patch[:, None, None, :]
        over_patches = scores.masked_fill(~patch, -torch.inf).max(3).values
        over_tokens = scores.masked_fill(~token, -torch.inf).max(2).values
        some_token, some_patch = real_token.any(1), real_patch.any(1)
        of_token = over_patches.masked_fill(~(real_token & some_patch[:, None, None]), 0)
        of_patch = over_tokens.masked_fill(~(real_patch[:, None] & some_token[:, None]), 0)
        return (
            of_token.sum(2) / real_token.sum(1).clamp(min=1),
            of_patch.sum(2) / real_patch.sum(1, keepdim=True).clamp(min=1),
        )

    return _over_images(of_chunk, tokens, patches, token_mask, patch_mask)


def _over_images(
    of_chunk: Callable[..., tuple[torch.Tensor, ...]],
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Join what `of_chunk` gives (images, reports) for chunks of images; as (reports, images)."""
    dtype = compute_dtype(tokens)
    w, real_token = _nothing_hidden(tokens.to(dtype), token_mask)
    v, real_patch = _nothing_hidden(patches.to(dtype), patch_mask)
    if torch.compiler.is_compiling():  # the compiler itself decides what to keep
        return tuple(part.T.contiguous() for part in of_chunk(w, v, real_token, real_patch))
    images = v.shape[0]
    chunk = max(1, CHUNK_SCORES // max(1, real_token.numel() * v.shape[1]))
    if chunk >= images:
        return tuple(part.T.contiguous() for part in of_chunk(w, v, real_token, real_patch))
    parts = [
        checkpoint(of_chunk, w, v_chunk, real_token, real_chunk, use_reentrant=False)
        for v_chunk, real_chunk in zip(v.split(chunk), real_patch.split(chunk), strict=True)
    ]
    return tuple(torch.cat(part).T.contiguous() for part in zip(*parts, strict=True))


def _nothing_hidden(
    rows: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with zeros where masked, so that nothing there counts, and at least one row; mask."""
    if mask is None:
        mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    rows = rows.masked_fill(~mask[:, :, None], 0)
    if rows.shape[1] == 0:
        return pad(rows, (0, 0, 0, 1)), pad(mask, (0, 1), value=False)
    return rows, mask


def _scores(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """⟨w_t, v_p⟩ of every image, report, token and patch: (Bi, Bt, T, P)."""
    return torch.matmul(w.flatten(0, 1), v.transpose(1, 2)).unflatten(1, w.shape[:2])


def _norm(square: torch.Tensor) -> torch.Tensor:
    return square.clamp(min=NORM_EPSILON**2).sqrt()
