"""Kernels of masked attention's backward, without atomics: every sum has one owner.

    P = exp(scale QKᵀ − logsumexp), dV = Pᵀ dO, dS = P (dO Vᵀ − Σ O dO), dQ = scale dS K,
    dK = scale dSᵀ Q; with dropout, P in dV and dO Vᵀ in dS are dropped as in the forward.

Where all queries of a head fit one tile, one program does everything: queries and their gradient
stay in it while it goes over the keys, and each tile of keys is read and its gradients are written
once. Above, that program owns only a tile of queries, and a second kernel owns the keys.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from mpma_ext.kernels.masked_attention_tiles import (
    LOG2E,
    SIZES,
    case,
    clear_rows,
    extent,
    kept,
    load_rows,
    origin,
    real_keys,
    rows,
    statistic_origin,
    store_rows,
)
from mpma_ext.kernels.philox import seed_words

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case


@triton.jit
def _load_queries(
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
def _add_tile(
    of_queries,  # q, grad (M, BLOCK_D), statistic, inner (M)
    of_keys,  # k, v (N, BLOCK_D), real (N)
    draw,  # seed, threshold, item, head, i (M) and first key of `kept`, or None without dropout
    sums,  # of the gradients of q, k and v, without scale
    scale,
    kept_scale,
    NEED_QUERY: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The three sums with one tile of weights added."""
    q, grad, statistic, inner = of_queries
    k, v, real = of_keys
    sum_query, sum_key, sum_value = sums
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    weights = tl.where(real[None], tl.exp2(scores - statistic[:, None]), 0.0)
    if draw is not None:
        seed, threshold, item, head, i, first = draw
        keep = kept(seed, threshold, item, head, i, first, k.shape[0])
        weights = tl.where(keep, weights, -weights)  # the sign remembers, and costs no register
    if NEED_VALUE:
        dropped = weights
        if draw is not None:
            dropped = tl.where(weights < 0, 0.0, weights * kept_scale)
        dropped = dropped.to(q.dtype)
        sum_value = tl.dot(tl.trans(dropped), grad, sum_value, input_precision=PRECISION)
    if NEED_QUERY or NEED_KEY:
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if draw is not None:
            grad_weights = tl.where(weights < 0, 0.0, grad_weights * kept_scale)
            weights = tl.abs(weights)
        grad_scores = (weights * (grad_weights - inner[:, None])).to(q.dtype)
        if NEED_KEY:
            sum_key = tl.dot(tl.trans(grad_scores), q, sum_key, input_precision=PRECISION)
        if NEED_QUERY:
            sum_query = tl.dot(grad_scores, k, sum_query, input_precision=PRECISION)
    return sum_query, sum_key, sum_value


@triton.jit
def _store_query_gradient(
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


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad_output,  # (items, queries, heads, WIDTH), packed (query_rows, heads, WIDTH)
    query,  # like grad_output
    key,  # (items, keys, heads, WIDTH), packed (key_rows, heads, WIDTH)
    value,  # like key
    output,  # like query
    logsumexp,  # (items, heads, queries), packed (heads, query_rows)
    key_padding_mask,  # (items, keys) bool or None
    cu_seqlens_q,  # (items + 1) int32 or None
    cu_seqlens_k,  # (items + 1) int32 or None
    dropout_seed,  # (1) int64 or None
    delta,  # like logsumexp: written for _backward_key; None where that does not run
    grad_query,  # like query, or None
    grad_key,  # like key, or None
    grad_value,  # like value, or None
    grad_output_steps,  # of an item, a row and a head; so are all steps
    query_steps,
    key_steps,
    value_steps,
    output_steps,
    grad_query_steps,
    grad_key_steps,  # grad_value's too
    heads,
    items,
    queries,
    keys,
    query_rows,
    key_rows,
    scale,
    kept_scale,
    threshold: tl.uint32,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.maximum(tl.cdiv(queries, BLOCK_M), 1)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    item = tl.program_id(0) // tiles // heads
    if cu_seqlens_q is not None:
        item -= 1
    start_q, length_q, stop_q = extent(cu_seqlens_q, item, items, query_rows, queries)
    start_k, length_k, stop_k = extent(cu_seqlens_k, item, items, key_rows, keys)
    grad_output = origin(grad_output, grad_output_steps, item, start_q, head)
    query = origin(query, query_steps, item, start_q, head)
    key = origin(key, key_steps, item, start_k, head)
    value = origin(value, value_steps, item, start_k, head)
    output = origin(output, output_steps, item, start_q, head)
    logsumexp = statistic_origin(logsumexp, cu_seqlens_q, item, start_q, heads, head, query_rows)
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask + item.to(tl.int64) * keys
    if delta is not None:
        delta = statistic_origin(delta, cu_seqlens_q, item, start_q, heads, head, query_rows)
    rows_q, rows_k = stop_q - start_q, stop_k - start_k
    if grad_query is not None:
        grad_query = origin(grad_query, grad_query_steps, item, start_q, head)
        first, stride = length_q + tile * BLOCK_M, tiles * BLOCK_M
        by_row = grad_query_steps[1]
        clear_rows(grad_query, first, rows_q, stride, by_row, WIDTH, BLOCK_M, BLOCK_D)
    by_row = grad_key_steps[1]
    if grad_key is not None:
        grad_key = origin(grad_key, grad_key_steps, item, start_k, head)
        clear_rows(grad_key, length_k, rows_k, BLOCK_N, by_row, WIDTH, BLOCK_N, BLOCK_D)
    if grad_value is not None:
        grad_value = origin(grad_value, grad_key_steps, item, start_k, head)
        clear_rows(grad_value, length_k, rows_k, BLOCK_N, by_row, WIDTH, BLOCK_N, BLOCK_D)
    first_q = tile * BLOCK_M
    if grad_key is None and grad_value is None:
        if first_q >= length_q:
            return
    if DROPOUT:
        seed = seed_words(dropout_seed)
    operands = (query, query_steps[1], grad_output, grad_output_steps[1], output, output_steps[1])
    of_queries = _load_queries(
        operands, logsumexp, delta, first_q, length_q, WIDTH, BLOCK_M, BLOCK_D
    )
    sum_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    NEED_QUERY: tl.constexpr = grad_query is not None
    NEED_KEY: tl.constexpr = grad_key is not None
    NEED_VALUE: tl.constexpr = grad_value is not None
    i = first_q + tl.arange(0, BLOCK_M)
    for first in range(0, length_k, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        real = real_keys(mask, j, length_k)
        k = load_rows(key, first, key_steps[1], real, WIDTH, BLOCK_D)
        v = load_rows(value, first, value_steps[1], real, WIDTH, BLOCK_D)
        of_keys = (k, v, real)
        sum_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        sum_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        draw = None
        if DROPOUT:
            draw = (seed, threshold, item, head, i, first)
        sums = (sum_query, sum_key, sum_value)
        sum_query, sum_key, sum_value = _add_tile(
            of_queries,
            of_keys,
            draw,
            sums,
            scale,
            kept_scale,
            NEED_QUERY,
            NEED_KEY,
            NEED_VALUE,
            PRECISION,
        )
        if NEED_VALUE:
            sum_value = tl.where(real[:, None], sum_value, 0.0)
            store_rows(grad_value, first, by_row, j < length_k, sum_value, WIDTH, BLOCK_D)
        if NEED_KEY:
            sum_key = tl.where(real[:, None], sum_key * scale, 0.0)
            store_rows(grad_key, first, by_row, j < length_k, sum_key, WIDTH, BLOCK_D)
    if NEED_QUERY:
        by_row = grad_query_steps[1]
        total = sum_query * scale
        _store_query_gradient(
            grad_query, by_row, first_q, length_q, of_queries, total, WIDTH, BLOCK_M, BLOCK_D
        )


@triton.jit(do_not_specialize=SIZES)
def _backward_key(
    grad_output,  # (items, queries, heads, WIDTH), packed (query_rows, heads, WIDTH)
    query,  # like grad_output
    key,  # (items, keys, heads, WIDTH), packed (key_rows, heads, WIDTH)
    value,  # like key
    logsumexp,  # (items, heads, queries), packed (heads, query_rows)
    key_padding_mask,  # (items, keys) bool or None
    cu_seqlens_q,  # (items + 1) int32 or None
    cu_seqlens_k,  # (items + 1) int32 or None
    dropout_seed,  # (1) int64 or None
    delta,  # like logsumexp
    grad_key,  # like key, or None
    grad_value,  # like value, or None
    grad_output_steps,  # of an item, a row and a head; so are all steps
    query_steps,
    key_steps,
    value_steps,
    grad_key_steps,  # grad_value's too
    heads,
    items,
    queries,
    keys,
    query_rows,
    key_rows,
    scale,
    kept_scale,
    threshold: tl.uint32,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.maximum(tl.cdiv(keys, BLOCK_N), 1)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    item = tl.program_id(0) // tiles // heads
    if cu_seqlens_q is not None:
        item -= 1
    start_q, length_q, _ = extent(cu_seqlens_q, item, items, query_rows, queries)
    start_k, length_k, stop_k = extent(cu_seqlens_k, item, items, key_rows, keys)
    grad_output = origin(grad_output, grad_output_steps, item, start_q, head)
    query = origin(query, query_steps, item, start_q, head)
    key = origin(key, key_steps, item, start_k, head)
    value = origin(value, value_steps, item, start_k, head)
    logsumexp = statistic_origin(logsumexp, cu_seqlens_q, item, start_q, heads, head, query_rows)
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask + item.to(tl.int64) * keys
    delta = statistic_origin(delta, cu_seqlens_q, item, start_q, heads, head, query_rows)
    first, rows_k, stride = length_k + tile * BLOCK_N, stop_k - start_k, tiles * BLOCK_N
    by_row = grad_key_steps[1]
    if grad_key is not None:
        grad_key = origin(grad_key, grad_key_steps, item, start_k, head)
        clear_rows(grad_key, first, rows_k, stride, by_row, WIDTH, BLOCK_N, BLOCK_D)
    if grad_value is not None:
        grad_value = origin(grad_value, grad_key_steps, item, start_k, head)
        clear_rows(grad_value, first, rows_k, stride, by_row, WIDTH, BLOCK_N, BLOCK_D)
    if tile * BLOCK_N >= length_k:
        return
    if DROPOUT:
        seed = seed_words(dropout_seed)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = real_keys(mask, j, length_k)
    k = load_rows(key, tile * BLOCK_N, key_steps[1], real, WIDTH, BLOCK_D)
    v = load_rows(value, tile * BLOCK_N, value_steps[1], real, WIDTH, BLOCK_D)
    of_keys = (k, v, real)
    NEED_KEY: tl.constexpr = grad_key is not None
    NEED_VALUE: tl.constexpr = grad_value is not None
    sum_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, length_q, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        inside = i < length_q
        q = load_rows(query, first, query_steps[1], inside, WIDTH, BLOCK_D)
        grad = load_rows(grad_output, first, grad_output_steps[1], inside, WIDTH, BLOCK_D)
        statistic = tl.load(logsumexp + i, mask=inside, other=float("inf")) * LOG2E
        inner = tl.load(delta + i, mask=inside, other=0)
        draw = None
        if DROPOUT:
            draw = (seed, threshold, item, head, i, tile * BLOCK_N)
        of_queries = (q, grad, statistic, inner)
        sums = (sum_key, sum_key, sum_value)  # the first is not added to
        _none, sum_key, sum_value = _add_tile(
            of_queries,
            of_keys,
            draw,
            sums,
            scale,
            kept_scale,
            False,
            NEED_KEY,
            NEED_VALUE,
            PRECISION,
        )
    if grad_value is not None:
        sum_value = tl.where(real[:, None], sum_value, 0.0)
        store_rows(grad_value, tile * BLOCK_N, by_row, j < length_k, sum_value, WIDTH, BLOCK_D)
    if grad_key is not None:
        sum_key = tl.where(real[:, None], sum_key * scale, 0.0)
        store_rows(grad_key, tile * BLOCK_N, by_row, j < length_k, sum_key, WIDTH, BLOCK_D)


def compile_cases() -> "Iterator[Case]":
    """Both kernels in every row of the table, padded and packed."""
    for row in rows(_backward):
        _, _, name, launched = row
        whole = not name.startswith("long") and int(name.split("x")[0]) <= launched["BLOCK_M"]
        absent = dict.fromkeys(("delta",) if whole else ("grad_key", "grad_value"))
        for packed in (False, True):
            yield case(_backward, row, packed, **absent)
    for row in rows(_backward_key):
        for packed in (False, True):
            yield case(_backward_key, row, packed)
