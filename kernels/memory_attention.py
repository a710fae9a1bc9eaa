"""Attention of many rows to one bank of slots, over all of them or over the best of a row.

Rows are flattened, so tiles are full whatever the batch, and all programs of a head read the same
slots. Over all slots the softmax is a running one; over the best, see memory_attention_topk.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels import memory_attention_topk
from mpma_ext.kernels.launch import launch
from mpma_ext.kernels.memory_attention_tiles import (
    DROPOUT_VARIANTS,
    NOT_SPECIALIZED,
    STEM,
    block_d,
    cases,
    dropout_arguments,
    in_place,
    keep_tile,
    load_rows,
    of_head,
    precision,
    store_rows,
    strided,
)

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

# Rows times heads of which candidates are held at a time: 32 or 64 MiB.
CANDIDATE_ROWS = 2**16


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _dense(
    query,  # (rows, heads, width)
    key,  # (slots, heads, width)
    value,  # (slots, heads, width)
    seed,  # (1) int64 or None
    output,  # (rows, heads, width)
    logsumexp,  # (rows, heads)
    rows,
    slots,
    heads,
    query_row,
    query_head,
    key_slot,
    key_head,
    value_slot,
    value_head,
    scale,
    threshold: tl.uint32,
    kept_scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    head, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    query, key = of_head(query, head, query_head), of_head(key, head, key_head)
    value, output = of_head(value, head, value_head), of_head(output, head, WIDTH)
    q = load_rows(query, first_row, query_row, row < rows, WIDTH, BLOCK_D)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    base = top
    for first in range(0, slots, BLOCK_N):
        real = first + tl.arange(0, BLOCK_N) < slots
        k = load_rows(key, first, key_slot, real, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(real[None], scores, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)  # nothing but -inf yet
        shrink = tl.exp(top - base)
        weights = tl.exp(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if seed is not None:
            keep = keep_tile(seed, threshold, row, head, first, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(value, first, value_slot, real, WIDTH, BLOCK_D)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
        top = highest
    mixed = mixed * (kept_scale / total)[:, None]
    store_rows(output, first_row, heads * WIDTH, row < rows, mixed, WIDTH, BLOCK_D)
    tl.store(logsumexp + row * heads + head, base + tl.log(total), mask=row < rows)


def memory_attention(
    query: torch.Tensor,
    memory_key: torch.Tensor,
    memory_value: torch.Tensor,
    topk: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (R, H, D), log-sum-exp (R, H), and the slots (R, H, topk) int32, ascending."""
    rows, heads, _ = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty((rows, heads), dtype=torch.float32)
    indices = query.new_empty((rows, heads, topk), dtype=torch.int32)
    results = (output, logsumexp, indices)
    if query.numel() == 0:
        return results
    tensors = {"query": query, "key": memory_key, "value": memory_value}
    operands = {name: in_place(tensor) for name, tensor in tensors.items()}
    dropout = dropout_arguments(dropout_p, dropout_seed)
    if topk == 0:
        _attend_to_all(operands, scale, dropout, output, logsumexp)
        return results
    step = max(1, CANDIDATE_ROWS // heads)
    for first in range(0, rows, step):
        piece = operands | {"query": operands["query"][first : first + step]}
        of_piece = (tensor[first : first + step] for tensor in results)
        memory_attention_topk.attend_to_best(piece, scale, dropout, first, *of_piece)
    return results


def _attend_to_all(operands, scale, dropout, output, logsumexp) -> None:
    query = operands["query"]
    rows, heads, width = query.shape
    row = launch(STEM, "_dense", query, str(block_d(width)))
    _dense[(triton.cdiv(rows, row["BLOCK_M"]) * heads,)](
        output=output,
        logsumexp=logsumexp,
        rows=rows,
        slots=operands["key"].shape[0],
        heads=heads,
        WIDTH=width,
        BLOCK_D=block_d(width),
        scale=scale,
        PRECISION=precision(),
        **strided(operands, "query", "key", "value"),
        **dropout,
        **row,
    )


def compile_cases() -> "Iterator[Case]":
    """Every kernel of the forward in every row of the table."""
    yield from cases(_dense, DROPOUT_VARIANTS)
    yield from memory_attention_topk.compile_cases()
