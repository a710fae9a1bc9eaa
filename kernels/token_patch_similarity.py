"""The softmax form of token-patch similarity (GLoRIA's), forward.

A program takes one image and as many reports as fill the rows of a tile, then the next. Scores are
a product over any width, a tile of patches at a time, and never leave the registers: only weights
e = exp(attention_temperature · a − shift), to be divided by their sum over patches, go to a scratch
that stays in the second-level cache. |c|² comes from a second product, eᵀ (V Vᵀ) e with the image's
Gram matrix or |eᵀ V|², whichever is less work.

A report longer than a tile takes a pass before, for the log-sum-exp over its tokens of every patch.
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

STEM = "token_patch_similarity"
NORM_EPSILON = tl.constexpr(1e-8)
# Bytes of scratch or of workspace, beside results.
WORKSPACE = 256 << 20
# Programs a multiprocessor, more than run at a time.
PROGRAMS = 4
# Up to which attention temperature e^-temperature, the least weight there is when the shift is the
# temperature, is a normal number with all its digits.
SAFE_TEMPERATURE = {torch.float16: 8.0, torch.bfloat16: 40.0, torch.float32: 40.0}


@triton.jit
def finite_top(top):
    """What to subtract from exponents of which `top` is the largest, also where none is real."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def merge_exponents(top, total, exponents, axis: tl.constexpr):
    """Goes on with a log-sum-exp, kept as largest exponent and sum of exp(exponent - largest)."""
    higher = tl.maximum(top, tl.max(exponents, axis))
    base = finite_top(higher)
    terms = tl.exp(exponents - tl.expand_dims(base, axis))
    return higher, total * tl.exp(top - base) + tl.sum(terms, axis)


@triton.jit
def _by_report(scores, real_token, REPORTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Scores as (REPORTS, BLOCK_T, BLOCK_P), -inf for tokens that are not real."""
    exponents = tl.where(real_token[:, None], scores, -float("inf"))
    return tl.reshape(exponents, (REPORTS, BLOCK_T, scores.shape[1]))


@triton.jit
def _softmax_over_tokens(exponents, column, p, within):
    """a (REPORTS, BLOCK_T, BLOCK_P): over the tile, or by the log-sum-exp kept in `column`."""
    pointers, row = column
    if pointers is None:
        a = tl.exp(exponents - finite_top(tl.max(exponents, 1))[:, None])
        total = tl.sum(a, 1)
        a = a / tl.where(total == 0, 1.0, total)[:, None]
    else:
        report = tl.arange(0, exponents.shape[0])
        logsumexp = tl.load(pointers + report[:, None] * row + p[None], mask=within[None], other=0)
        a = tl.exp(exponents - logsumexp[:, None])
    return a


@triton.jit
def token_rows(token_side, first, t0, reports, T, REPORTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Reports and tokens of a tile's rows, pointers to them, and which are real."""
    row = tl.arange(0, REPORTS * BLOCK_T)
    report, t = first + row // BLOCK_T, t0 + row % BLOCK_T
    rows, real = rows_of(token_side, report, t, (report < reports) & (t < T))
    return report, t, rows, real


@triton.jit
def store_logsumexp(
    column,
    token_side,
    patch_side,
    first,
    image,
    sizes,
    REPORTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For every patch of an image, the log-sum-exp of its scores over all tokens of each report."""
    reports, T, P, D = sizes
    pointers, row = column
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        v, real_patch = rows_of(patch_side, image, p, p < P)
        top = tl.full((REPORTS, BLOCK_P), -float("inf"), tl.float32)
        total = tl.zeros((REPORTS, BLOCK_P), tl.float32)
        for t0 in range(0, T, BLOCK_T):
            _, _, w, real = token_rows(token_side, first, t0, reports, T, REPORTS, BLOCK_T)
            scores = scores_of(w, real, v, real_patch, D, BLOCK_D, PRECISION)
            exponents = _by_report(scores, real, REPORTS, BLOCK_T)
            top, total = merge_exponents(top, total, exponents, 1)
        logsumexp = tl.where(total == 0, 0.0, top + tl.log(total))
        offset = tl.arange(0, REPORTS)[:, None] * row + p[None]
        tl.store(pointers + offset, logsumexp, mask=(p < P)[None])
    tl.debug_barrier()  # read by other threads


@triton.jit
def store_weights(
    weights,  # (REPORTS * BLOCK_T) pointers to rows of P_padded weights
    kept_scores,  # the same for scores, or None
    within,  # (REPORTS * BLOCK_T), which rows there are
    w,  # (REPORTS * BLOCK_T) pointers to tokens
    real_token,
    patch_side,
    column,
    image,
    P,
    P_padded,
    D,
    temperature,
    SAFE: tl.constexpr,
    REPORTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores e = exp(temperature · a − shift); returns Σ e, and Σ e · scores, over the patches.

    a lies in [0, 1], so that a shift by a moderate temperature does for the largest exponent.
    Another takes a pass of its own to find that.
    """
    shift = tl.zeros(w.shape, tl.float32) + tl.maximum(temperature, 0.0)
    if not SAFE:
        shift = tl.full(w.shape, -float("inf"), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            v, real_patch = rows_of(patch_side, image, p, p < P)
            scores = scores_of(w, real_token, v, real_patch, D, BLOCK_D, PRECISION)
            exponents = _by_report(scores, real_token, REPORTS, BLOCK_T)
            a = tl.reshape(_softmax_over_tokens(exponents, column, p, p < P), scores.shape)
            exponents = tl.where(real_patch[None], temperature * a, -float("inf"))
            shift = tl.maximum(shift, tl.max(exponents, 1))
        shift = finite_top(shift)
    total = tl.zeros(w.shape, tl.float32)
    inner = tl.zeros(w.shape, tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        v, real_patch = rows_of(patch_side, image, p, p < P)
        scores = scores_of(w, real_token, v, real_patch, D, BLOCK_D, PRECISION)
        exponents = _by_report(scores, real_token, REPORTS, BLOCK_T)
        a = tl.reshape(_softmax_over_tokens(exponents, column, p, p < P), scores.shape)
        e = tl.where(real_patch[None], tl.exp(temperature * a - shift[:, None]), 0.0)
        stored = within[:, None] & (p < P_padded)[None]
        e = e.to(weights.dtype.element_ty)
        tl.store(weights[:, None] + p[None], e, mask=stored)
        if kept_scores is not None:
            tl.store(kept_scores[:, None] + p[None], scores, mask=stored)
        # Sums of what was stored, so that its rounding cancels in the cosine.
        e = e.to(tl.float32)
        total += tl.sum(e, 1)
        inner += tl.sum(tl.where(real_patch[None], e * scores, 0.0), 1)
    return total, inner


@triton.jit
def cosine_of(inner, square, token_norm):
    """⟨w, c⟩ / (|w| |c|), each norm clamped, and |c|² as it was used.

    Where patches cancel, rounding could leave the Gram form below what Cauchy and Schwarz allow,
    even negative.
    """
    clamped = token_norm < NORM_EPSILON
    norm = tl.where(clamped, NORM_EPSILON, token_norm)
    least = tl.where(clamped, 0.0, inner / norm)
    square = tl.maximum(square, least * least)
    return inner / (norm * tl.maximum(tl.sqrt(square), NORM_EPSILON)), square


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _similarity(
    tokens,  # (reports, T, D)
    patches,  # (images, P, D)
    token_mask,  # (reports, T) or None
    patch_mask,  # (images, P) or None
    token_norm,  # (reports, T) float32
    factor,  # (images, P_padded, N), the Gram matrices; or the patches
    weights,  # (programs, REPORTS * BLOCK_T, P_padded) scratch
    column,  # (programs, REPORTS, P_padded) float32 scratch; None: one tile of tokens
    out,  # (reports, images) float32
    reports,
    images,
    T,
    P,
    D,
    P_padded,
    N,
    tokens_item,
    tokens_row,
    patches_item,
    patches_row,
    factor_item,
    factor_row,
    attention_temperature,
    pooling_temperature,
    BY_GRAM: tl.constexpr,
    SAFE: tl.constexpr,
    REPORTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_side = (tokens, tokens_item, tokens_row, token_mask, T)
    patch_side = (patches, patches_item, patches_row, patch_mask, P)
    factor_side = (factor, factor_item, factor_row, patch_mask, P)
    rows: tl.constexpr = REPORTS * BLOCK_T
    program = tl.program_id(0).to(tl.int64)
    scratch = weights + (program * rows + tl.arange(0, rows)) * P_padded
    if column is not None:
        column += program * REPORTS * P_padded
    groups = tl.cdiv(reports, REPORTS)
    for work in range(tl.program_id(0), groups * images, tl.num_programs(0)):
        image, first = work // groups, work % groups * REPORTS
        if column is not None:
            store_logsumexp(
                (column, P_padded), token_side, patch_side, first, image, (reports, T, P, D),
                REPORTS, BLOCK_T, BLOCK_P, BLOCK_D, PRECISION,
            )  # fmt: skip
        top = tl.full((REPORTS,), -float("inf"), tl.float32)
        pooled = tl.zeros((REPORTS,), tl.float32)
        for t0 in range(0, T, BLOCK_T):
            report, t, w, real_token = token_rows(
                token_side, first, t0, reports, T, REPORTS, BLOCK_T
            )
            total, inner = store_weights(
                scratch, None, (report < reports) & (t < T), w, real_token, patch_side,
                (column, P_padded), image, P, P_padded, D, attention_temperature,
                SAFE, REPORTS, BLOCK_T, BLOCK_P, BLOCK_D, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()  # the scratch is read by other threads
            square = tl.zeros((rows,), tl.float32)
            for n0 in range(0, N, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                product = tl.zeros((rows, BLOCK_N), tl.float32)
                for k0 in range(0, P_padded, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    e = tl.load(scratch[:, None] + k[None], mask=(k < P_padded)[None], other=0)
                    x, real = rows_of(factor_side, image, k, k < P)
                    x = tl.load(x[:, None] + n[None], mask=real[:, None] & (n < N)[None], other=0)
                    product = tl.dot(e, x, product, input_precision=PRECISION)
                other = product
                if BY_GRAM:
                    other = tl.load(scratch[:, None] + n[None], mask=(n < N)[None], other=0)
                square += tl.sum(product * other, 1)
            tl.debug_barrier()  # before the scratch is written anew
            norm = tl.load(token_norm + report.to(tl.int64) * T + t, mask=real_token, other=0)
            something = real_token & (total != 0)
            total = tl.where(total == 0, 1.0, total)
            cosine, _ = cosine_of(inner / total, square / (total * total), norm)
            exponents = tl.where(something, pooling_temperature * cosine, -float("inf"))
            exponents = tl.reshape(exponents, (REPORTS, BLOCK_T))
            top, pooled = merge_exponents(top, pooled, exponents, 1)
        report = first + tl.arange(0, REPORTS)
        similarity = tl.where(pooled == 0, 0.0, top + tl.log(pooled))
        tl.store(out + report.to(tl.int64) * images + image, similarity, mask=report < reports)


def token_patch_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    attention_temperature: float,
    pooling_temperature: float,
) -> torch.Tensor:
    """The similarity of every report with every image, (Bt, Bi) float32."""
    (reports, T, D), (images, P, _) = tokens.shape, patches.shape
    out = tokens.new_zeros((reports, images), dtype=torch.float32)
    if 0 in (reports, images, T, P):
        return out
    tokens, patches = rows_in_place(tokens), rows_in_place(patches)
    row = launch(STEM, "_similarity", tokens, bucket(T, P))
    by_gram = gram_is_less(tokens.dtype, P, D)
    factor = gram(padded(patches, patch_mask)) if by_gram else patches
    P_padded = padded_length(P)
    rows = row["REPORTS"] * row["BLOCK_T"]
    pairs = triton.cdiv(reports, row["REPORTS"]) * images
    programs = min(pairs, _programs(tokens.device, rows * P_padded * tokens.element_size()))
    column = None
    if T > row["BLOCK_T"]:
        column = out.new_empty(programs, row["REPORTS"], P_padded)
    _similarity[(programs,)](
        tokens,
        patches,
        packed(token_mask),
        packed(patch_mask),
        token_norms(tokens),
        factor,
        tokens.new_empty(programs, rows, P_padded),
        column,
        out,
        reports,
        images,
        T,
        P,
        D,
        P_padded,
        factor.shape[2],
        *tokens.stride()[:2],
        *patches.stride()[:2],
        *factor.stride()[:2],
        attention_temperature,
        pooling_temperature,
        BY_GRAM=by_gram,
        SAFE=is_safe(attention_temperature, tokens.dtype),
        PRECISION=precision(tokens),
        **row,
    )
    return out


def is_safe(attention_temperature: float, dtype: torch.dtype) -> bool:
    """Whether the temperature will do as the largest exponent."""
    return abs(attention_temperature) <= SAFE_TEMPERATURE[dtype]


def gram_is_less(dtype: torch.dtype, P: int, D: int, worth: int = 1) -> bool:
    """Whether |c|² is to come from Gram matrices: where P is up to `worth` times D.

    Never in float16, whose range squares of features leave; in bfloat16 only of more than 16
    patches, which average out the rounding of the matrix.
    """
    precise = {torch.float32: True, torch.bfloat16: P > 16, torch.float16: False}[dtype]
    return precise and P <= worth * D


def token_norms(tokens: torch.Tensor) -> torch.Tensor:
    """|w| of every token in float32."""
    return torch.linalg.vector_norm(tokens, dim=2, dtype=torch.float32).contiguous()


def padded_length(P: int) -> int:
    """Patches in a row of weights, so that every row starts at 16 bytes."""
    return triton.cdiv(P, 16) * 16


def padded(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Patches (images, P_padded, D), 0 where not real."""
    items, length, width = rows.shape
    out = rows.new_zeros(items, padded_length(length), width)
    out[:, :length] = rows if mask is None else rows.masked_fill(~mask[:, :, None], 0)
    return out


def gram(real_patches: torch.Tensor) -> torch.Tensor:
    """V Vᵀ of every image."""
    return torch.bmm(real_patches, real_patches.transpose(1, 2))


def bucket(T: int, P: int) -> str:
    """Key of a launch: up to how many tokens and patches it is meant for."""
    return f"{64 if T <= 64 else 128}x{64 if P <= 64 else 256}"


def _programs(device: torch.device, scratch: int) -> int:
    """How many programs to start where each needs so many bytes."""
    if device.type == "cpu":
        return 2
    resident = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(resident, WORKSPACE // scratch))


def compile_cases() -> Iterator["Case"]:
    """The kernel in every row of the table, at 768 features: with and without Gram matrices."""
    tensors = dict.fromkeys(("tokens", "patches", "factor", "weights"))
    tensors |= dict.fromkeys(("token_mask", "patch_mask"), torch.bool)
    tensors |= dict.fromkeys(("token_norm", "column", "out"), torch.float32)
    by_gram = {"BY_GRAM": True, "SAFE": True, "N": 208, "factor_item": 208 * 208}
    by_gram |= {"factor_row": 208, "column": None}
    without = {**by_gram, "BY_GRAM": False, "N": 768, "factor_item": 196 * 768, "factor_row": 768}
    many = {name: value for name, value in without.items() if name != "column"}
    many |= {"T": 200}
    yield from cases(STEM, _similarity, tensors, by_gram)
    yield from cases(STEM, _similarity, tensors, without, " without Gram")
    yield from cases(STEM, _similarity, tensors, many, " many tokens")
    unsafe = {"SAFE": False}
    yield from cases(STEM, _similarity, tensors, without | unsafe, " large temperature")
    yield from cases(STEM, _similarity, tensors, many | unsafe, " many tokens large temperature")
