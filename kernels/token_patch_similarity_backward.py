"""The softmax form of token-patch similarity (GLoRIA's), backward.

Works on blocks of reports and images, whose scores S and weights e it recomputes and keeps in a
bounded workspace. With b = e / Σ e, c = Σ b v, and of every token

    dcos = g · pooling_temperature · its share in the sum over tokens
    of_inner = dcos / (|w| |c|)                    of ⟨w, c⟩
    of_square = −dcos · cos / |c|²                 twice that of |c|², 0 where |c| is clamped

    dB = of_inner · S + of_square · (b V) Vᵀ
    E = attention_temperature · b (dB − Σ_p b dB)
    dS = of_inner · b + a (E − Σ_t a E)
    dW = dS V − (dcos · cos / |w|²) w
    dV = dSᵀ W + bᵀ (of_square · b) V

What has tokens times patches for its result is a kernel here; sums over whole blocks, the last two
lines and b V or b (V Vᵀ), are products of PyTorch, each with one order.
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
)
from mpma_ext.kernels.token_patch_similarity import (
    NORM_EPSILON,
    STEM,
    WORKSPACE,
    bucket,
    cosine_of,
    gram,
    gram_is_less,
    is_safe,
    merge_exponents,
    padded,
    store_logsumexp,
    store_weights,
    token_norms,
    token_rows,
)

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

# What is kept of every token, in float32: Σ e; Σ e S, which becomes of_inner; |c|², which becomes
# of_square; the cosine, which becomes Σ_p b dB; what the token's gradient holds of itself.
TOTAL = tl.constexpr(0)
INNER = tl.constexpr(1)
SQUARE = tl.constexpr(2)
COSINE = tl.constexpr(3)
ITSELF = tl.constexpr(4)
STATISTICS = 5


@triton.jit(
    do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=["token_mask", "patch_mask"]
)
def _weights(
    tokens,  # (reports, T, D)
    patches,  # (images, P, D)
    token_mask,  # (reports, T) or None
    patch_mask,  # (images, P) or None
    weights,  # (images, reports, T, P_padded)
    scores,  # (images, reports, T, P_padded) float32
    column,  # (images, reports, P_padded) float32; None: one tile of tokens
    statistics,  # (STATISTICS, images, reports, T) float32
    reports,
    images,
    T,
    P,
    D,
    P_padded,
    tokens_item,
    tokens_row,
    patches_item,
    patches_row,
    attention_temperature,
    SAFE: tl.constexpr,
    REPORTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_side = (tokens, tokens_item, tokens_row, token_mask, T)
    patch_side = (patches, patches_item, patches_row, patch_mask, P)
    groups = tl.cdiv(reports, REPORTS)
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first = group * REPORTS
    if column is not None:
        column += tl.program_id(0).to(tl.int64) * REPORTS * P_padded
        store_logsumexp(
            (column, P_padded), token_side, patch_side, first, image, (reports, T, P, D),
            REPORTS, BLOCK_T, BLOCK_P, BLOCK_D, PRECISION,
        )  # fmt: skip
    count = images.to(tl.int64) * reports * T
    for t0 in range(0, T, BLOCK_T):
        report, t, w, real = token_rows(token_side, first, t0, reports, T, REPORTS, BLOCK_T)
        within = (report < reports) & (t < T)
        row = (image.to(tl.int64) * reports + report) * T + t
        total, inner = store_weights(
            weights + row * P_padded, scores + row * P_padded, within, w, real, patch_side,
            (column, P_padded), image, P, P_padded, D, attention_temperature,
            SAFE, REPORTS, BLOCK_T, BLOCK_P, BLOCK_D, PRECISION,
        )  # fmt: skip
        tl.store(statistics + TOTAL * count + row, tl.where(real, total, 0.0), mask=within)
        tl.store(statistics + INNER * count + row, inner, mask=within)


@triton.jit(
    do_not_specialize=[*NOT_SPECIALIZED, "grad_report", "grad_image"],
    do_not_specialize_on_alignment=["token_norm", "grad_output"],
)
def _token_gradients(
    weights,  # (images, reports, T, P_padded)
    product,  # (images, reports, T, N) e V Vᵀ or e V; becomes of_square times b V Vᵀ or c
    statistics,  # (STATISTICS, images, reports, T) float32
    token_norm,  # (reports, T) float32
    grad_output,  # (reports, images) float32
    reports,
    images,
    T,
    N,
    P_padded,
    grad_report,
    grad_image,
    pooling_temperature,
    BY_GRAM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, report = tl.program_id(0) // reports, tl.program_id(0) % reports
    first = tl.program_id(0).to(tl.int64) * T
    count = images.to(tl.int64) * reports * T
    statistics += first
    top = tl.full((1,), -float("inf"), tl.float32)
    pooled = tl.zeros((1,), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        total = tl.load(statistics + TOTAL * count + t, mask=t < T, other=0)
        inner = tl.load(statistics + INNER * count + t, mask=t < T, other=0)
        # That of a masked token may be NaN.
        norm = tl.load(token_norm + report * T + t, mask=(t < T) & (total != 0), other=0)
        square = tl.zeros((BLOCK_T,), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            within = (t < T)[:, None] & (n < N)[None]
            x = tl.load(product + (first + t)[:, None] * N + n[None], mask=within, other=0)
            x = x.to(tl.float32)
            other = x
            if BY_GRAM:
                other = weights + (first + t)[:, None] * P_padded + n[None]
                other = tl.load(other, mask=within, other=0).to(tl.float32)
            square += tl.sum(x * other, 1)
        something = total != 0
        total = tl.where(something, total, 1.0)
        cosine, square = cosine_of(inner / total, square / (total * total), norm)
        tl.store(statistics + SQUARE * count + t, square, mask=t < T)
        tl.store(statistics + COSINE * count + t, cosine, mask=t < T)
        exponents = tl.where(something, pooling_temperature * cosine, -float("inf"))
        top, pooled = merge_exponents(top, pooled, exponents[None], 1)
    tl.debug_barrier()  # statistics are read again by other threads
    logsumexp = top + tl.log(pooled)
    grad = tl.load(grad_output + report * grad_report + image * grad_image)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        total = tl.load(statistics + TOTAL * count + t, mask=t < T, other=0)
        inner = tl.load(statistics + INNER * count + t, mask=t < T, other=0)
        square = tl.load(statistics + SQUARE * count + t, mask=t < T, other=0)
        cosine = tl.load(statistics + COSINE * count + t, mask=t < T, other=0)
        token = tl.load(token_norm + report * T + t, mask=(t < T) & (total != 0), other=0)
        tl.debug_barrier()  # several threads read a statistic, and one writes it
        something = total != 0
        total = tl.where(something, total, 1.0)
        share = tl.exp(pooling_temperature * cosine - logsumexp)
        grad_cosine = tl.where(something, grad * pooling_temperature * share, 0.0)
        through_cosine = tl.where(something, grad_cosine * cosine, 0.0)
        norm = tl.sqrt(square)
        of_inner = grad_cosine / (tl.maximum(token, NORM_EPSILON) * tl.maximum(norm, NORM_EPSILON))
        of_square = tl.where(norm < NORM_EPSILON, 0.0, -through_cosine / square)
        of_itself = tl.where(token < NORM_EPSILON, 0.0, -through_cosine / (token * token))
        mean = tl.where(something, of_inner * inner / total + of_square * square, 0.0)
        tl.store(statistics + INNER * count + t, of_inner, mask=t < T)
        tl.store(statistics + SQUARE * count + t, of_square, mask=t < T)
        tl.store(statistics + COSINE * count + t, mean, mask=t < T)
        tl.store(statistics + ITSELF * count + t, of_itself, mask=t < T)
        scale = (of_square / total)[:, None]
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            within = (t < T)[:, None] & (n < N)[None]
            x = product + (first + t)[:, None] * N + n[None]
            scaled = tl.where(something[:, None], tl.load(x, mask=within, other=0) * scale, 0.0)
            tl.store(x, scaled, mask=within)


@triton.jit
def _exponents(scores, row, p, t, P_padded, total, T):
    """Scores of tokens t with patches p, -inf where a token is not real."""
    within = (t < T)[:, None] & (p < P_padded)[None]
    x = tl.load(scores + (row + t)[:, None] * P_padded + p[None], mask=within, other=0)
    return tl.where((total != 0)[:, None], x, -float("inf"))


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=["patch_mask"])
def _score_gradients(
    weights,  # (images, reports, T, P_padded) e; becomes b
    scores,  # (images, reports, T, P_padded) float32
    grad_weights,  # (images, reports, T, P_padded) of_square · b V Vᵀ; becomes of_square · b
    statistics,  # (STATISTICS, images, reports, T) float32
    patch_mask,  # (images, P) or None
    grad_scores,  # (reports, T, images, P_padded), the result
    reports,
    images,
    T,
    P,
    P_padded,
    attention_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image, report = tl.program_id(0) // reports, tl.program_id(0) % reports
    row = tl.program_id(0).to(tl.int64) * T
    count = images.to(tl.int64) * reports * T
    statistics += row
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    patch_side = (scores, 0, 0, patch_mask, P)
    _, real_patch = rows_of(patch_side, image, p, p < P)
    top = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    pooled = tl.zeros((BLOCK_P,), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        total = tl.load(statistics + TOTAL * count + t, mask=t < T, other=0)
        exponents = _exponents(scores, row, p, t, P_padded, total, T)
        top, pooled = merge_exponents(top, pooled, exponents, 0)
    logsumexp = tl.where(pooled == 0, 0.0, top + tl.log(pooled))
    column = tl.zeros((BLOCK_P,), tl.float32)  # Σ_t a E
    # The last of two passes stores; a tile of the first is still in the first-level cache.
    for step in range(0, 2 * tl.cdiv(T, BLOCK_T)):
        last = step >= tl.cdiv(T, BLOCK_T)
        t = step % tl.cdiv(T, BLOCK_T) * BLOCK_T + tl.arange(0, BLOCK_T)
        total = tl.load(statistics + TOTAL * count + t, mask=t < T, other=0)
        of_inner = tl.load(statistics + INNER * count + t, mask=t < T, other=0)[:, None]
        of_square = tl.load(statistics + SQUARE * count + t, mask=t < T, other=0)[:, None]
        mean = tl.load(statistics + COSINE * count + t, mask=t < T, other=0)[:, None]
        within = (t < T)[:, None] & (p < P_padded)[None]
        place = (row + t)[:, None] * P_padded + p[None]
        exponents = _exponents(scores, row, p, t, P_padded, total, T)
        real = (total != 0)[:, None] & real_patch[None]
        e = tl.load(weights + place, mask=within, other=0).to(tl.float32)
        b = tl.where(real, e / tl.where(total == 0, 1.0, total)[:, None], 0.0)
        grad_b = tl.load(grad_weights + place, mask=within, other=0).to(tl.float32)
        grad_b += of_inner * exponents
        through_b = tl.where(real, attention_temperature * b * (grad_b - mean), 0.0)
        a = tl.exp(exponents - logsumexp[None])
        if last:
            grad_score = tl.where(real, of_inner * b + a * (through_b - column[None]), 0.0)
            there = ((report.to(tl.int64) * T + t)[:, None] * images + image) * P_padded + p[None]
            tl.store(grad_scores + there, grad_score, mask=within)
            tl.store(weights + place, b, mask=within)
            tl.store(grad_weights + place, of_square * b, mask=within)
        else:
            column += tl.sum(a * through_b, 0)


def token_patch_similarity_backward(
    grad_output: torch.Tensor,
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    attention_temperature: float,
    pooling_temperature: float,
    need_tokens: bool,
    need_patches: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of tokens and patches, empty where not needed."""
    (reports, T, D), (images, P, _) = tokens.shape, patches.shape
    grad_tokens = tokens.new_zeros((reports, T, D) if need_tokens else 0, dtype=torch.float32)
    grad_patches = patches.new_zeros((images, P, D) if need_patches else 0)
    if 0 in (reports, images, T, P) or not (need_tokens or need_patches):
        return grad_tokens.to(tokens.dtype), grad_patches
    tokens, patches = rows_in_place(tokens), rows_in_place(patches)
    token_mask, patch_mask, norms = packed(token_mask), packed(patch_mask), token_norms(tokens)
    w, v = _zeroed(tokens, token_mask), padded(patches, patch_mask)
    by_gram = gram_is_less(tokens.dtype, P, D, worth=2)
    factor = gram(v) if by_gram else v
    block_reports, block_images = _block(reports, images, T * _bytes_a_token(v, by_gram))
    for i in _slices(images, block_images):
        of_images = torch.zeros_like(v[i], dtype=torch.float32)
        for j in _slices(reports, block_reports):
            b, product, grad_scores, of_itself = _grad_scores(
                grad_output[j, i],
                (tokens[j], None if token_mask is None else token_mask[j], norms[j]),
                (patches[i], None if patch_mask is None else patch_mask[i], factor[i]),
                (attention_temperature, pooling_temperature),
                by_gram,
            )
            if need_tokens:
                of_tokens = (grad_scores @ v[i].flatten(0, 1)).view_as(w[j])
                grad_tokens[j] += of_tokens + of_itself[:, :, None] * w[j]
            if need_patches:
                of_images += (grad_scores.T @ w[j].flatten(0, 1)).view_as(of_images)
                through_square = torch.bmm(b.transpose(1, 2), product)
                of_images += torch.bmm(through_square, v[i]) if by_gram else through_square
        if need_patches:
            grad_patches[i] = of_images[:, :P]
    return (
        _zeroed(grad_tokens.to(tokens.dtype), token_mask if need_tokens else None),
        _zeroed(grad_patches, patch_mask if need_patches else None),
    )


def _grad_scores(
    grad_output: torch.Tensor,
    token_side: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    patch_side: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    temperatures: tuple[float, float],
    by_gram: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of a block's scores, and what else the gradients take.

    Args:
        token_side: tokens (J, T, D), their mask, their norms.
        patch_side: patches (I, P, D), their mask, and Gram matrices (I, P_padded, P_padded) or real
            patches (I, P_padded, D).

    Returns:
        b (I, J · T, P_padded); of_square · b, or of_square · c (I, J · T, D) without Gram matrices;
        the gradient (J · T, I · P_padded); what the gradients of tokens hold of themselves (J, T).
    """
    (tokens, token_mask, norms), (patches, patch_mask, factor) = token_side, patch_side
    (reports, T, D), (images, P, _) = tokens.shape, patches.shape
    P_padded = factor.shape[1]
    weights = tokens.new_empty(images, reports * T, P_padded)
    scores = torch.empty_like(weights, dtype=torch.float32)
    statistics = scores.new_empty(STATISTICS, images, reports, T)
    row = launch(STEM, "_weights", tokens, bucket(T, P))
    groups = triton.cdiv(reports, row["REPORTS"])
    column = None
    if T > row["BLOCK_T"]:
        column = scores.new_empty(images, groups * row["REPORTS"], P_padded)
    _weights[(groups * images,)](
        tokens,
        patches,
        token_mask,
        patch_mask,
        weights,
        scores,
        column,
        statistics,
        reports,
        images,
        T,
        P,
        D,
        P_padded,
        *tokens.stride()[:2],
        *patches.stride()[:2],
        temperatures[0],
        SAFE=is_safe(temperatures[0], tokens.dtype),
        PRECISION=precision(tokens),
        **row,
    )
    product = torch.bmm(weights, factor)
    _token_gradients[(reports * images,)](
        weights,
        product,
        statistics,
        norms,
        grad_output,
        reports,
        images,
        T,
        product.shape[2],
        P_padded,
        *grad_output.stride(),
        temperatures[1],
        BY_GRAM=by_gram,
        **launch(STEM, "_token_gradients", tokens, "any"),
    )
    grad_weights = product if by_gram else torch.bmm(product, factor.transpose(1, 2))
    grad_scores = tokens.new_empty(reports * T, images * P_padded)
    row = launch(STEM, "_score_gradients", tokens, "any")
    _score_gradients[(reports * images, triton.cdiv(P_padded, row["BLOCK_P"]))](
        weights,
        scores,
        grad_weights,
        statistics,
        patch_mask,
        grad_scores,
        reports,
        images,
        T,
        P,
        P_padded,
        temperatures[0],
        **row,
    )
    return weights, product, grad_scores, statistics[ITSELF.value].sum(0)


def _zeroed(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows with 0 where masked."""
    return rows if mask is None else rows.masked_fill(~mask[:, :, None], 0)


def _bytes_a_token(v: torch.Tensor, by_gram: bool) -> int:
    """Workspace of a token and an image: scores; weights, gradients of both, and e V."""
    kept = 3 * v.shape[1] + (0 if by_gram else v.shape[2])
    return 4 * v.shape[1] + kept * v.element_size()


def _block(reports: int, images: int, bytes_a_pair: int) -> tuple[int, int]:
    """How many reports and images to take at a time."""
    pairs = max(1, WORKSPACE // bytes_a_pair)
    block_reports = min(reports, pairs)
    return block_reports, max(1, pairs // block_reports)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def compile_cases() -> Iterator["Case"]:
    """Every kernel in every row of the table, at 768 features."""
    tensors = dict.fromkeys(("tokens", "patches", "weights", "product", "grad_weights"))
    tensors |= {"grad_scores": None} | dict.fromkeys(("token_mask", "patch_mask"), torch.bool)
    of_scores = ("scores", "statistics", "column", "token_norm", "grad_output")
    tensors |= dict.fromkeys(of_scores, torch.float32)
    for safe, variant in ((True, ""), (False, " large temperature")):
        yield from cases(STEM, _weights, tensors, {"SAFE": safe, "column": None}, variant)
        many = {"SAFE": safe, "T": 200}
        yield from cases(STEM, _weights, tensors, many, f" many tokens{variant}")
    of_grad = {"grad_report": 256, "grad_image": 1}
    by_gram, without = {"BY_GRAM": True, "N": 208}, {"BY_GRAM": False, "N": 768}
    yield from cases(STEM, _token_gradients, tensors, by_gram | of_grad)
    yield from cases(STEM, _token_gradients, tensors, without | of_grad, " without Gram")
    yield from cases(STEM, _score_gradients, tensors, {})
