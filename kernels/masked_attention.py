"""Attention with key padding: the forward of its padded, packed-projection and packed forms.

A program owns a tile of queries of one head. Where all keys fit one tile the softmax is a plain
one; above, a running one that rescales what it has summed.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels.launch import launch
from mpma_ext.kernels.masked_attention_tiles import (
    LN2,
    LOG2E,
    SIZES,
    STEM,
    block_d,
    bucket,
    case,
    clear_rows,
    extent,
    in_place,
    kept,
    load_rows,
    origin,
    precision,
    real_keys,
    rows,
    statistic_origin,
    steps,
    store_rows,
)
from mpma_ext.kernels.philox import dropout_threshold, seed_words

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query,  # (items, queries, heads, WIDTH), packed (query_rows, heads, WIDTH)
    key,  # (items, keys, heads, WIDTH), packed (key_rows, heads, WIDTH)
    value,  # like key
    key_padding_mask,  # (items, keys) bool or None
    cu_seqlens_q,  # (items + 1) int32 or None
    cu_seqlens_k,  # (items + 1) int32 or None
    dropout_seed,  # (1) int64 or None
    output,  # like query
    logsumexp,  # (items, heads, queries), packed (heads, query_rows)
    query_steps,  # of an item, a row and a head; so are all steps
    key_steps,
    value_steps,
    output_steps,
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
    ONE_TILE: tl.constexpr,
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
    start_k, length_k, _ = extent(cu_seqlens_k, item, items, key_rows, keys)
    query = origin(query, query_steps, item, start_q, head)
    key = origin(key, key_steps, item, start_k, head)
    value = origin(value, value_steps, item, start_k, head)
    output = origin(output, output_steps, item, start_q, head)
    logsumexp = statistic_origin(logsumexp, cu_seqlens_q, item, start_q, heads, head, query_rows)
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask + item.to(tl.int64) * keys
    if cu_seqlens_q is not None:
        end = stop_q - start_q
        first, stride = length_q + tile * BLOCK_M, tiles * BLOCK_M
        clear_rows(output, first, end, stride, output_steps[1], WIDTH, BLOCK_M, BLOCK_D)
        for start in range(first, end, stride):
            row = start + tl.arange(0, BLOCK_M)
            tl.store(logsumexp + row, tl.full((BLOCK_M,), float("inf"), tl.float32), row < end)
        if tile * BLOCK_M >= length_q:
            return
    if DROPOUT:
        seed = seed_words(dropout_seed)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(query, tile * BLOCK_M, query_steps[1], i < length_q, WIDTH, BLOCK_D)
    if ONE_TILE:
        j = tl.arange(0, BLOCK_N)
        real = real_keys(mask, j, length_k)
        k = load_rows(key, 0, key_steps[1], real, WIDTH, BLOCK_D)
        v = load_rows(value, 0, value_steps[1], real, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(real[None], scores, -float("inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(kept(seed, threshold, item, head, i, 0, BLOCK_N), weights, 0.0)
        mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        found = tl.max(real.to(tl.int32), 0)
    else:
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        found = length_k * 0
        for first in range(0, length_k, BLOCK_N):
            j = first + tl.arange(0, BLOCK_N)
            real = real_keys(mask, j, length_k)
            k = load_rows(key, first, key_steps[1], real, WIDTH, BLOCK_D)
            v = load_rows(value, first, value_steps[1], real, WIDTH, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            scores = tl.where(real[None], scores, -float("inf"))
            highest = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(highest == -float("inf"), 0.0, highest)  # no real key yet
            shrink = tl.exp2(top - base)
            weights = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(weights, 1)
            if DROPOUT:
                keep = kept(seed, threshold, item, head, i, first, BLOCK_N)
                weights = tl.where(keep, weights, 0.0)
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
            top = highest
            found = tl.maximum(found, tl.max(real.to(tl.int32), 0))
    mixed = tl.where(found != 0, mixed * (kept_scale / total)[:, None], 0.0)
    statistic = tl.where(found != 0, (top + tl.log2(total)) * LN2, float("inf"))
    store_rows(output, tile * BLOCK_M, output_steps[1], i < length_q, mixed, WIDTH, BLOCK_D)
    tl.store(logsumexp + i, statistic, mask=i < length_q)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None],
    longest: tuple[int, int],
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of any form."""
    *_, query_rows, heads, width = query.shape
    query, key, value = in_place(query), in_place(key), in_place(value)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty((*query.shape[:-3], heads, query_rows), dtype=torch.float32)
    queries, keys = longest
    packed = cu_seqlens[0] is not None
    items = cu_seqlens[0].shape[0] - 1 if packed else query.shape[0]
    if output.numel() == 0:
        return output, logsumexp
    row = launch(STEM, "_forward", query, bucket(keys, width, dropout_p))
    tiles = max(triton.cdiv(queries, row["BLOCK_M"]), 1)  # without queries, to clear their rows
    _forward[tiles * heads * (items + 2 * packed),](
        query,
        key,
        value,
        None if key_padding_mask is None else key_padding_mask.contiguous(),
        *cu_seqlens,
        dropout_seed,
        output,
        logsumexp,
        steps(query),
        steps(key),
        steps(value),
        steps(output),
        heads,
        items,
        queries,
        keys,
        query_rows,
        key.shape[-3],
        scale,
        1 / (1 - dropout_p),
        dropout_threshold(dropout_p),
        WIDTH=width,
        DROPOUT=dropout_p > 0,
        ONE_TILE=keys <= row["BLOCK_N"],
        PRECISION=precision(),
        BLOCK_D=block_d(width),
        **row,
    )
    return output, logsumexp


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Sq, H, D) and log-sum-exp (B, H, Sq)."""
    longest = (query.shape[1], key.shape[1])
    return _attend(
        query,
        key,
        value,
        key_padding_mask,
        (None, None),
        longest,
        scale,
        dropout_p,
        dropout_seed,
    )


def masked_attention_qkvpacked(
    qkv: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, S, H, D) and log-sum-exp (B, H, S), the packed projection read in place."""
    return masked_attention(*qkv.unbind(2), key_padding_mask, scale, dropout_p, dropout_seed)


def masked_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (Nq, H, D) and log-sum-exp (H, Nq); 0 and infinity in rows of no sequence."""
    cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    longest = (min(max_seqlen_q, query.shape[0]), min(max_seqlen_k, key.shape[0]))
    return _attend(
        query,
        key,
        value,
        None,
        cu_seqlens,
        longest,
        scale,
        dropout_p,
        dropout_seed,
    )


def compile_cases() -> "Iterator[Case]":
    """The forward in every row of the table, padded and packed."""
    for row in rows(_forward):
        _, _, name, launched = row
        one_tile = not name.startswith("long") and int(name.split("x")[0]) <= launched["BLOCK_N"]
        for packed in (False, True):
            yield case(_forward, row, packed, ONE_TILE=one_tile)
