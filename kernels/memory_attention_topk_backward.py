"""The gradients of memory attention over the best slots, which are taken from the forward.

In the notation of memory_attention_backward: a program owns a few rows, gathers their K keys and
values, makes their softmax anew, Δ = Σ w z⟨g, v⟩ with it, sums dq, and leaves the K pairs
(w z, scale s) of a row behind. Every slot then sums the pairs that name it, in order of rows, which
a stable sort of the slots' numbers has found.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels.launch import launch
from mpma_ext.kernels.memory_attention_tiles import (
    DROPOUT_VARIANTS,
    NOT_SPECIALIZED,
    STEM,
    block_d,
    block_k,
    cases,
    gather_rows,
    keep_slots,
    load_rows,
    of_head,
    store_rows,
    strided,
)

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

# Entries (a row, a head, a kept slot) that are sorted at a time, which takes about 40 bytes each.
ENTRIES = 2**21


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _best_rows(
    grad_output,  # (rows, heads, width)
    query,  # (rows, heads, width)
    key,  # (slots, heads, width)
    value,  # (slots, heads, width)
    indices,  # (rows, heads, topk) int32
    seed,  # (1) int64 or None
    grad_query,  # (rows, heads, width) or None
    coefficients,  # (heads, rows, topk, 2) or None, of the bank's gradients: value's and key's
    topk,
    rows,
    heads,
    grad_output_row,
    grad_output_head,
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
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    head, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    real_row = row < rows
    place = row * heads + head
    nth = tl.arange(0, BLOCK_K)
    real = real_row[:, None] & (nth < topk)[None]
    index = place[:, None] * topk + nth[None]
    slot = tl.load(indices + index, mask=real, other=0)
    query, key = of_head(query, head, query_head), of_head(key, head, key_head)
    value = of_head(value, head, value_head)
    grad_output = of_head(grad_output, head, grad_output_head)
    q = load_rows(query, first_row, query_row, real_row, WIDTH, BLOCK_D).to(tl.float32)
    g = load_rows(grad_output, first_row, grad_output_row, real_row, WIDTH, BLOCK_D).to(tl.float32)
    k = gather_rows(key, slot, key_slot, real, WIDTH, BLOCK_D)
    scores = tl.where((nth < topk)[None], tl.sum(q[:, None] * k, 2) * scale, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    v = gather_rows(value, slot, value_slot, real, WIDTH, BLOCK_D)
    grad_weights = tl.sum(g[:, None] * v, 2)
    kept_weights = weights
    if seed is not None:
        keep = keep_slots(seed, threshold, row, head, slot)
        kept_weights = tl.where(keep, weights * kept_scale, 0.0)
        grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
    delta = tl.sum(weights * grad_weights, 1)[:, None]
    grad_scores = weights * (grad_weights - delta) * scale
    if grad_query is not None:
        total = tl.sum(grad_scores[:, :, None] * k, 1)
        grad_query = of_head(grad_query, head, WIDTH)
        store_rows(grad_query, first_row, heads * WIDTH, real_row, total, WIDTH, BLOCK_D)
    if coefficients is not None:
        pair = coefficients + 2 * ((head.to(tl.int64) * rows + row)[:, None] * topk + nth[None])
        tl.store(pair, kept_weights, mask=real)
        tl.store(pair + 1, grad_scores, mask=real)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _best_slots(
    grad_output,  # (rows, heads, width)
    query,  # (rows, heads, width)
    coefficients,  # (heads, rows, topk, 2)
    order,  # (heads * rows * topk) int64: numbers of coefficients, by head, slot and row
    starts,  # (heads * slots + 1) int64: where a slot's begin in order
    grad_key,  # (slots, heads of the bank, width) or None
    grad_value,  # (slots, heads of the bank, width) or None
    rows,
    slots,
    heads,  # of the bank, of which those of the other operands are some
    grad_output_row,
    grad_output_head,
    query_row,
    query_head,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,  # constant, since every coefficient's number is divided by it
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    start = tl.load(starts + tl.program_id(0))
    stop = tl.load(starts + tl.program_id(0) + 1)
    query = of_head(query, head, query_head)
    grad_output = of_head(grad_output, head, grad_output_head)
    key_total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    value_total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_M):
        position = first + tl.arange(0, BLOCK_M)
        real = position < stop
        number = tl.load(order + position, mask=real, other=0)
        row = number // TOPK - head.to(tl.int64) * rows
        if grad_value is not None:
            weight = tl.load(coefficients + 2 * number, mask=real, other=0)
            g = gather_rows(grad_output, row, grad_output_row, real, WIDTH, BLOCK_D)
            value_total += weight[:, None] * g
        if grad_key is not None:
            grad_score = tl.load(coefficients + 2 * number + 1, mask=real, other=0)
            q = gather_rows(query, row, query_row, real, WIDTH, BLOCK_D)
            key_total += grad_score[:, None] * q
    d = tl.arange(0, BLOCK_D)
    place = (slot.to(tl.int64) * heads + head) * WIDTH + d
    if grad_key is not None:
        tl.store(grad_key + place, tl.sum(key_total, 0), mask=d < WIDTH)
    if grad_value is not None:
        tl.store(grad_value + place, tl.sum(value_total, 0), mask=d < WIDTH)


def gradients(
    operands: dict[str, torch.Tensor],
    indices: torch.Tensor,
    dropout: dict[str, object],
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> list[torch.Tensor | None]:
    """Gradients of query, key and value, None where not needed."""
    query, slots = operands["query"], operands["key"].shape[0]
    (rows, heads, width), topk = query.shape, indices.shape[2]
    D, K = block_d(width), block_k(topk)
    need_bank = need_key or need_value
    grad_query = query.new_empty(query.shape) if need_query else None
    coefficients = None
    if need_bank:
        coefficients = query.new_empty((heads, rows, topk, 2), dtype=torch.float32)
    row = launch(STEM, "_best_rows", query, f"{D}x{K}")
    _best_rows[(triton.cdiv(rows, row["BLOCK_M"]) * heads,)](
        indices=indices,
        grad_query=grad_query,
        coefficients=coefficients,
        topk=topk,
        rows=rows,
        heads=heads,
        WIDTH=width,
        BLOCK_K=K,
        BLOCK_D=D,
        **strided(operands, "grad_output", "query", "key", "value"),
        **dropout,
        **row,
    )
    if not need_bank:
        return [grad_query, None, None]
    shape = (slots, heads, width)
    bank = [query.new_empty(shape) if needed else None for needed in (need_key, need_value)]
    row = launch(STEM, "_best_slots", query, str(D))
    step = max(1, ENTRIES // (rows * topk))
    for some in (slice(first, first + step) for first in range(0, heads, step)):
        order, starts = by_slot(indices[:, some], slots)
        operands_of_some = {name: operands[name][:, some] for name in ("grad_output", "query")}
        grad_key, grad_value = (None if grad is None else grad[:, some] for grad in bank)
        _best_slots[(starts.shape[0] - 1,)](
            coefficients=coefficients[some],
            order=order,
            starts=starts,
            grad_key=grad_key,
            grad_value=grad_value,
            rows=rows,
            slots=slots,
            heads=heads,
            TOPK=topk,
            WIDTH=width,
            BLOCK_D=D,
            **strided(operands_of_some, "grad_output", "query"),
            **row,
        )
    return [grad_query, *bank]


def by_slot(indices: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the entries (R, H, K), sorted by head, slot and row, and where a slot's begin.

    Both count head by head; the second has heads * slots + 1 elements. Two bytes a key, where they
    do, halve the passes of a radix sort.
    """
    heads = indices.shape[1]
    dtype = torch.int16 if heads * slots < 2**15 else torch.int32
    numbers = torch.arange(heads * slots + 1, dtype=dtype, device=indices.device)
    keys = indices.transpose(0, 1).to(dtype) + numbers[:-1:slots, None, None]
    keys, order = keys.flatten().sort(stable=True)
    return order, torch.searchsorted(keys, numbers)


def compile_cases() -> "Iterator[Case]":
    """Both kernels in every row of the table, all gradients needed."""
    yield from cases(_best_rows, DROPOUT_VARIANTS, uses_dot=False)
    yield from cases(_best_slots, {"": {"TOPK": 32}}, uses_dot=False)
