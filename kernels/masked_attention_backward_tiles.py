"""What the kernels of masked attention's backward are made of: tiles of queries, keys and weights.

A tile of queries is (q, grad (M, BLOCK_D), statistic, inner (M)), a tile of keys is
(k, v (N, BLOCK_D), real (N)).
"""

import triton
import triton.language as tl

from mpma_ext.kernels.masked_attention_tiles import LOG2E, kept, load_rows, store_rows


@triton.jit
def load_queries(
    operands,  # pointers to the first query of a head, and their steps from row to row
    logsumexp,
    delta,
    first,
    length,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a tile of queries brings: itself, its gradient, log2-sum-exp2, and Σ output · grad.

    Where there is no query the log-sum-exp is infinite, and all weights are 0.
    """
    query, query_row, grad_output, grad_output_row, output, output_row = operands
    i = first + tl.arange(0, BLOCK_M)
    inside = i < length
    q = load_rows(query, first, query_row, inside, WIDTH, BLOCK_D)
    grad = load_rows(grad_output, first, grad_output_row, inside, WIDTH, BLOCK_D)
    out = load_rows(output, first, output_row, inside, WIDTH, BLOCK_D)
    inner = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if delta is not None:
        tl.store(delta + i, inner, mask=inside)
    statistic = tl.load(logsumexp + i, mask=inside, other=float("inf")) * LOG2E
    return q, grad, statistic, inner


@triton.jit
def weights_of(
    of_queries,
    of_keys,
    draw,  # seed, threshold, item, head, i (M) and first key of `kept`, or None without dropout
    scale,
    PRECISION: tl.constexpr,
):
    """Weights (M, N), negative where dropped: the sign remembers, and costs no register."""
    q, _, statistic, _ = of_queries
    k, _, real = of_keys
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.where(real[None], tl.exp2(scores - statistic[:, None]), 0.0)
    if draw is not None:
        seed, threshold, item, head, i, first = draw
        keep = kept(seed, threshold, item, head, i, first, k.shape[0])
        weights = tl.where(keep, weights, -weights)
    return weights


@triton.jit
def add_value_gradient(
    total,  # (N, BLOCK_D)
    weights,  # (M, N) of `weights_of`
    of_queries,
    kept_scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum with one tile added."""
    _, grad, _, _ = of_queries
    if DROPOUT:
        weights = tl.where(weights < 0, 0.0, weights * kept_scale)
    return tl.dot(tl.trans(weights.to(grad.dtype)), grad, total, input_precision=PRECISION)


@triton.jit
def score_gradients(
    weights,  # (M, N) of `weights_of`
    of_queries,
    of_keys,
    kept_scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the scaled scores (M, N), in the dtype that they are multiplied in."""
    q, grad, _, inner = of_queries
    _, v, _ = of_keys
    through = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        through = tl.where(weights < 0, 0.0, through * kept_scale)
        weights = tl.abs(weights)
    return (weights * (through - inner[:, None])).to(q.dtype)


@triton.jit
def store_key_gradient(
    gradient,
    by_row,
    first,
    length,
    of_keys,
    total,  # (N, BLOCK_D)
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of keys or values: what is masked has none, not even a NaN."""
    _, _, real = of_keys
    total = tl.where(real[:, None], total, 0.0)
    inside = first + tl.arange(0, BLOCK_N) < length
    store_rows(gradient, first, by_row, inside, total, WIDTH, BLOCK_D)


@triton.jit
def store_query_gradient(
    grad_query,
    by_row,
    first,
    length,
    of_queries,
    total,  # (M, BLOCK_D)
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row without keys passes no gradient, not even a NaN of its output's."""
    _, _, statistic, _ = of_queries
    total = tl.where((statistic != float("inf"))[:, None], total, 0.0)
    inside = first + tl.arange(0, BLOCK_M) < length
    store_rows(grad_query, first, by_row, inside, total, WIDTH, BLOCK_D)
