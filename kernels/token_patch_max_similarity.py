"""The max form of token-patch similarity (FILIP's): both maxima of a pair from one product.

A program of the forward takes one image and as many reports as fill the rows of a tile. The
backward is one product a side. Report j owns

    dW_j = Σ_i M_ji V_i,  M_ji[t, p] = g_ji [patch p is t's nearest] + h_ji [token t is p's nearest]

with g and h the gradients of the two means over their counts; image i owns dV_i = Σ_j M_jiᵀ W_j. M
is made in registers from the two saved indices, so that every sum has one owner and one order.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels.launch import launch
from mpma_ext.kernels.similarity_tiles import (
    NOT_SPECIALIZED,
    cases,
    packed,
    precision,
    rows_in_place,
    rows_of,
    scores_of,
)

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

STEM = "token_patch_max_similarity"
NOWHERE = tl.constexpr(2**30)  # beyond every position


@triton.jit
def _best(scores, position, axis: tl.constexpr):
    """The maximum along an axis, a NaN above all, and the first position where it stands."""
    best = tl.max(scores, axis)  # ignores NaN
    stands = scores == tl.expand_dims(best, axis)
    index = tl.where(scores != scores, position - NOWHERE, tl.where(stands, position, NOWHERE))
    index = tl.min(index, axis)
    is_nan = index < 0
    return tl.where(is_nan, float("nan"), best), tl.where(is_nan, index + NOWHERE, index)


@triton.jit
def _first_best(best, index, later, later_index):
    """The better of two maxima of which the second stands further on."""
    better = (later > best) | ((later != later) & (best == best)) | (index == NOWHERE)
    return tl.where(better, later, best), tl.where(better, later_index, index)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _max_similarity(
    tokens,  # (reports, T, D)
    patches,  # (images, P, D)
    token_mask,  # (reports, T) or None
    patch_mask,  # (images, P) or None
    to_patches,  # (reports, images)
    to_tokens,  # (reports, images)
    patch_index,  # (reports, images, T)
    token_index,  # (reports, images, P)
    of_patch,  # (reports, images, P) float32, what token_index stands for; None: one tile of tokens
    reports,
    images,
    T,
    P,
    D,
    tokens_item,
    tokens_row,
    patches_item,
    patches_row,
    REPORTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_side = (tokens, tokens_item, tokens_row, token_mask, T)
    patch_side = (patches, patches_item, patches_row, patch_mask, P)
    groups = tl.cdiv(reports, REPORTS)
    image = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * REPORTS
    row = tl.arange(0, REPORTS * BLOCK_T)
    of_row = first + row // BLOCK_T
    report = first + tl.arange(0, REPORTS)
    pair = report.to(tl.int64) * images + image
    token_sum = tl.zeros((REPORTS,), tl.float32)
    token_count = tl.zeros((REPORTS,), tl.float32)
    patch_sum = tl.zeros((REPORTS,), tl.float32)
    patch_count = 0.0
    for t0 in range(0, T, BLOCK_T):
        t = t0 + row % BLOCK_T
        w, real_token = rows_of(token_side, of_row, t, (of_row < reports) & (t < T))
        # Positions of what is masked are no candidates.
        position = tl.reshape(tl.where(real_token, t, NOWHERE), (REPORTS, BLOCK_T, 1))
        best = tl.full((REPORTS, BLOCK_T), -float("inf"), tl.float32)
        nearest = tl.full((REPORTS, BLOCK_T), NOWHERE, tl.int32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            v, real_patch = rows_of(patch_side, image, p, p < P)
            scores = scores_of(w, real_token, v, real_patch, D, BLOCK_D, PRECISION)
            scores = tl.where(real_token[:, None] & real_patch[None], scores, -float("inf"))
            scores = tl.reshape(scores, (REPORTS, BLOCK_T, BLOCK_P))

            candidate = tl.where(real_patch, p, NOWHERE)[None, None]
            best, nearest = _first_best(best, nearest, *_best(scores, candidate, 2))

            top, at = _best(scores, position, 1)
            offset = pair[:, None] * P + p[None]
            within = (report < reports)[:, None] & (p < P)[None]
            if of_patch is None:
                found = (at != NOWHERE) & real_patch[None]
                tl.store(token_index + offset, tl.where(found, at, 0), mask=within)
                patch_sum += tl.sum(tl.where(found, top, 0.0), 1)
                patch_count += tl.sum(real_patch.to(tl.float32))
            else:
                earlier = within & (t0 > 0)
                before = tl.load(of_patch + offset, mask=earlier, other=0)
                index = tl.load(token_index + offset, mask=earlier, other=NOWHERE)
                top, at = _first_best(before, index, top, at)
                tl.store(of_patch + offset, top, mask=within)
                tl.store(token_index + offset, at, mask=within)
        within = (of_row < reports) & (t < T)
        best, nearest = tl.reshape(best, row.shape), tl.reshape(nearest, row.shape)
        found = (nearest != NOWHERE) & real_token
        offset = (of_row.to(tl.int64) * images + image) * T + t
        tl.store(patch_index + offset, tl.where(found, nearest, 0), mask=within)
        token_sum += tl.sum(tl.reshape(tl.where(found, best, 0.0), (REPORTS, BLOCK_T)), 1)
        token_count += tl.sum(tl.reshape(real_token.to(tl.float32), (REPORTS, BLOCK_T)), 1)
        tl.debug_barrier()  # of_patch and token_index are read again by other threads
    if of_patch is not None:
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            _, real_patch = rows_of(patch_side, image, p, p < P)
            offset = pair[:, None] * P + p[None]
            within = (report < reports)[:, None] & (p < P)[None]
            at = tl.load(token_index + offset, mask=within, other=NOWHERE)
            top = tl.load(of_patch + offset, mask=within, other=0)
            tl.debug_barrier()  # several threads read an index, and one writes it
            found = (at != NOWHERE) & real_patch[None]
            tl.store(token_index + offset, tl.where(found, at, 0), mask=within)
            patch_sum += tl.sum(tl.where(found, top, 0.0), 1)
            patch_count += tl.sum(real_patch.to(tl.float32))
    tl.store(to_patches + pair, token_sum / tl.maximum(token_count, 1.0), mask=report < reports)
    tl.store(to_tokens + pair, patch_sum / tl.maximum(patch_count, 1.0), mask=report < reports)


@triton.jit(do_not_specialize=["other_items", "M", "K", "own_pair", "other_pair"])
def _max_gradient(
    others,  # (other items, K, D), what the gradient is a sum of
    own_mask,  # (own items, M) or None
    other_mask,  # (other items, K) or None
    own_index,  # (pairs, M), the nearest of the other item
    other_index,  # (pairs, K), the nearest of the own item
    own_grad,  # (pairs), of every one of an own item's maxima
    other_grad,  # (pairs)
    grad,  # (own items, M, D), the result
    other_items,
    M,
    K,
    D,
    own_pair,  # pairs from one own item to the next
    other_pair,
    others_item,
    others_row,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    own = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    own_side = (grad, 0, 0, own_mask, M)
    other_side = (others, others_item, others_row, other_mask, K)
    _, real_own = rows_of(own_side, own, m, m < M)
    # No index is negative: what is masked is nobody's nearest and has none.
    chosen_own = tl.where(real_own, m, -1)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tiles = tl.cdiv(K, BLOCK_K)
    for step in range(0, other_items * tiles):
        other = step // tiles
        k = step % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
        row, real_other = rows_of(other_side, other, k, k < K)
        x = tl.load(row[:, None] + d[None], mask=real_other[:, None] & (d < D)[None], other=0)
        pair = own.to(tl.int64) * own_pair + other.to(tl.int64) * other_pair
        mine = tl.load(own_index + pair * M + m, mask=real_own, other=-2)
        theirs = tl.load(other_index + pair * K + k, mask=real_other, other=-2)
        chosen_other = tl.where(real_other, k, -1)
        weight = tl.where(mine[:, None] == chosen_other[None], tl.load(own_grad + pair), 0.0)
        weight += tl.where(theirs[None] == chosen_own[:, None], tl.load(other_grad + pair), 0.0)
        total = tl.dot(weight.to(x.dtype), x, total, input_precision=PRECISION)
    total = tl.where(real_own[:, None], total, 0.0)
    offset = (own.to(tl.int64) * M + m)[:, None] * D + d[None]
    tl.store(grad + offset, total, mask=(m < M)[:, None] & (d < D)[None])


def bucket(T: int, P: int) -> str:
    """Key of a launch: up to how many tokens and patches it is meant for."""
    of_tokens = 64 if T <= 64 else 128
    return f"{of_tokens}x{64 if P <= 64 else 256}"


def gradient_bucket(rows: int, D: int) -> str:
    """Key of a launch of the backward, for a side with so many rows."""
    width = 64 if D <= 64 else 128 if D <= 128 else 256
    return f"{64 if rows <= 64 else 128}x{width}"


def token_patch_max_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both means (Bt, Bi) and the argmaxes behind them, (Bt, Bi, T) and (Bt, Bi, P) int32."""
    (reports, T, D), (images, P, _) = tokens.shape, patches.shape
    pair = (reports, images)
    outs = [tokens.new_zeros(pair, dtype=torch.float32) for _ in range(2)]
    indices = [tokens.new_zeros((*pair, n), dtype=torch.int32) for n in (T, P)]
    if 0 in (*pair, T, P):
        return *outs, *indices
    tokens, patches = rows_in_place(tokens), rows_in_place(patches)
    row = launch(STEM, "_max_similarity", tokens, bucket(T, P))
    of_patch = None if T <= row["BLOCK_T"] else torch.empty_like(indices[1], dtype=torch.float32)
    _max_similarity[(triton.cdiv(reports, row["REPORTS"]) * images,)](
        tokens,
        patches,
        packed(token_mask),
        packed(patch_mask),
        *outs,
        *indices,
        of_patch,
        reports,
        images,
        T,
        P,
        D,
        *tokens.stride()[:2],
        *patches.stride()[:2],
        PRECISION=precision(tokens),
        **row,
    )
    return *outs, *indices


def token_patch_max_similarity_backward(
    grad_tokens_to_patches: torch.Tensor,
    grad_patches_to_tokens: torch.Tensor,
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    patch_index: torch.Tensor,
    token_index: torch.Tensor,
    need_tokens: bool,
    need_patches: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of tokens and patches, empty where not needed."""
    images = patches.shape[0]
    of_tokens = (grad_tokens_to_patches / _counts(tokens, token_mask)[:, None]).contiguous()
    of_patches = (grad_patches_to_tokens / _counts(patches, patch_mask)).contiguous()
    report_side = (tokens, token_mask, patch_index.contiguous(), of_tokens, images)
    image_side = (patches, patch_mask, token_index.contiguous(), of_patches, 1)
    return (
        _gradient(report_side, image_side) if need_tokens else tokens.new_empty(0),
        _gradient(image_side, report_side) if need_patches else patches.new_empty(0),
    )


def _counts(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How many real rows every item has, at least 1."""
    if mask is None:
        return torch.full((rows.shape[0],), max(1, rows.shape[1]), device=rows.device)
    return mask.sum(1).clamp(min=1)


def _gradient(own: tuple, other: tuple) -> torch.Tensor:
    """The gradient of a side.

    A side is its rows, their mask, the indices of their nearest, the gradients of their maxima, and
    how many pairs lie between two of its items.
    """
    own_rows, own_mask, own_index, own_grad, own_pair = own
    other_rows, other_mask, other_index, other_grad, other_pair = other
    (items, M, D), (other_items, K, _) = own_rows.shape, other_rows.shape
    grad = torch.zeros_like(own_rows, memory_format=torch.contiguous_format)
    if 0 in (items, M, D, other_items, K):
        return grad
    other_rows = rows_in_place(other_rows)
    row = launch(STEM, "_max_gradient", own_rows, gradient_bucket(M, D))
    grid = (items * triton.cdiv(M, row["BLOCK_M"]), triton.cdiv(D, row["BLOCK_D"]))
    _max_gradient[grid](
        other_rows,
        packed(own_mask),
        packed(other_mask),
        own_index,
        other_index,
        own_grad,
        other_grad,
        grad,
        other_items,
        M,
        K,
        D,
        own_pair,
        other_pair,
        *other_rows.stride()[:2],
        PRECISION=precision(own_rows),
        **row,
    )
    return grad


def compile_cases() -> Iterator["Case"]:
    """Every kernel in every row of the table, at 768 features."""
    sides = {"tokens": None, "patches": None, "token_mask": torch.bool, "patch_mask": torch.bool}
    results = dict.fromkeys(("to_patches", "to_tokens", "of_patch"), torch.float32)
    results |= dict.fromkeys(("patch_index", "token_index"), torch.int32)
    yield from cases(STEM, _max_similarity, sides | results, {"of_patch": None})
    yield from cases(STEM, _max_similarity, sides | results, {"T": 200}, " many tokens")
    tensors = {"others": None, "grad": None, "own_mask": torch.bool, "other_mask": torch.bool}
    tensors |= dict.fromkeys(("own_index", "other_index"), torch.int32)
    tensors |= dict.fromkeys(("own_grad", "other_grad"), torch.float32)
    of_reports = {
        **{"other_items": 256, "M": 64, "K": 196, "own_pair": 256, "other_pair": 1},
        **{"others_item": 196 * 768, "others_row": 768},
    }
    yield from cases(STEM, _max_gradient, tensors, of_reports)
