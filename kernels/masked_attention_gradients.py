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

from mpma_ext.kernels.masked_attention_backward_tiles import (
    add_value_gradient,
    load_queries,
    score_gradients,
    store_key_gradient,
    store_query_gradient,
    weights_of,
)
from mpma_ext.kernels.masked_attention_tiles import (
    LOG2E,
    SIZES,
    case,
    clear_rows,
    extent,
    load_rows,
    origin,
    real_keys,
    rows,
    statistic_origin,
)
from mpma_ext.kernels.philox import seed_words

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case


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
    of_queries = load_queries(
        operands, logsumexp, delta, first_q, length_q, WIDTH, BLOCK_M, BLOCK_D
    )
    sum_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    i = first_q + tl.arange(0, BLOCK_M)
    for first in range(0, length_k, BLOCK_N):
        real = real_keys(mask, first + tl.arange(0, BLOCK_N), length_k)
        k = load_rows(key, first, key_steps[1], real, WIDTH, BLOCK_D)
        v = load_rows(value, first, value_steps[1], real, WIDTH, BLOCK_D)
        of_keys = (k, v, real)
        draw = None
        if DROPOUT:
            draw = (seed, threshold, item, head, i, first)
        weights = weights_of(of_queries, of_keys, draw, scale, PRECISION)
        if grad_value is not None:
            total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            total = add_value_gradient(total, weights, of_queries, kept_scale, DROPOUT, PRECISION)
            store_key_gradient(
                grad_value, by_row, first, length_k, of_keys, total, WIDTH, BLOCK_N, BLOCK_D
            )
        if grad_query is not None or grad_key is not None:
            grad_scores = score_gradients(
                weights, of_queries, of_keys, kept_scale, DROPOUT, PRECISION
            )
            if grad_query is not None:
                sum_query = tl.dot(grad_scores, k, sum_query, input_precision=PRECISION)
            if grad_key is not None:
                q, _, _, _ = of_queries
                total = tl.dot(tl.trans(grad_scores), q, input_precision=PRECISION) * scale
                store_key_gradient(
                    grad_key, by_row, first, length_k, of_keys, total, WIDTH, BLOCK_N, BLOCK_D
                )
    if grad_query is not None:
        by_row = grad_query_steps[1]
        total = sum_query * scale
        store_query_gradient(
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
    first_k = tile * BLOCK_N
    first, rows_k, stride = length_k + first_k, stop_k - start_k, tiles * BLOCK_N
    by_row = grad_key_steps[1]
    if grad_key is not None:
        grad_key = origin(grad_key, grad_key_steps, item, start_k, head)
        clear_rows(grad_key, first, rows_k, stride, by_row, WIDTH, BLOCK_N, BLOCK_D)
    if grad_value is not None:
        grad_value = origin(grad_value, grad_key_steps, item, start_k, head)
        clear_rows(grad_value, first, rows_k, stride, by_row, WIDTH, BLOCK_N, BLOCK_D)
    if first_k >= length_k:
        return
    if DROPOUT:
        seed = seed_words(dropout_seed)
    real = real_keys(mask, first_k + tl.arange(0, BLOCK_N), length_k)
    k = load_rows(key, first_k, key_steps[1], real, WIDTH, BLOCK_D)
    v = load_rows(value, first_k, value_steps[1], real, WIDTH, BLOCK_D)
    of_keys = (k, v, real)
    sum_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, length_q, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        inside = i < length_q
        q = load_rows(query, first, query_steps[1], inside, WIDTH, BLOCK_D)
        grad = load_rows(grad_output, first, grad_output_steps[1], inside, WIDTH, BLOCK_D)
        statistic = tl.load(logsumexp + i, mask=inside, other=float("inf")) * LOG2E
        inner = tl.load(delta + i, mask=inside, other=0)
        of_queries = (q, grad, statistic, inner)
        draw = None
        if DROPOUT:
            draw = (seed, threshold, item, head, i, first_k)
        weights = weights_of(of_queries, of_keys, draw, scale, PRECISION)
        if grad_value is not None:
            sum_value = add_value_gradient(
                sum_value, weights, of_queries, kept_scale, DROPOUT, PRECISION
            )
        if grad_key is not None:
            grad_scores = score_gradients(
                weights, of_queries, of_keys, kept_scale, DROPOUT, PRECISION
            )
            sum_key = tl.dot(tl.trans(grad_scores), q, sum_key, input_precision=PRECISION)
    if grad_value is not None:
        store_key_gradient(
            grad_value, by_row, first_k, length_k, of_keys, sum_value, WIDTH, BLOCK_N, BLOCK_D
        )
    if grad_key is not None:
        total = sum_key * scale
        store_key_gradient(
            grad_key, by_row, first_k, length_k, of_keys, total, WIDTH, BLOCK_N, BLOCK_D
        )


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
