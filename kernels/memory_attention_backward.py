"""The gradients of memory attention, without atomics: every sum has one owner and one order.

With w = exp(scale·⟨q, k⟩ - logsumexp), z the dropout (0 or 1 / (1 - p)), g the gradient of the
output o and Δ = ⟨g, o⟩, the gradient of a score is s = w (z⟨g, v⟩ - Δ) and

    dq = scale Σ_slots s k      dk = scale Σ_rows s q      dv = Σ_rows w z g

Over all slots, one kernel owns tiles of rows and another tiles of slots; where the latter are few,
several share the rows among them and their partial sums are added. Over the best slots, see
memory_attention_topk_backward.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels import memory_attention_topk_backward
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

# Up to which the programs over slots are multiplied by sharing the rows. A constant, so that the
# order of the sums does not depend on how many processors a device has.
PROGRAMS = 512


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _delta(
    grad_output,  # (rows, heads, width)
    output,  # (rows, heads, width)
    delta,  # (rows, heads)
    rows,
    heads,
    grad_output_row,
    grad_output_head,
    output_row,
    output_head,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    head, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    g, o = of_head(grad_output, head, grad_output_head), of_head(output, head, output_head)
    g = load_rows(g, first_row, grad_output_row, row < rows, WIDTH, BLOCK_D).to(tl.float32)
    o = load_rows(o, first_row, output_row, row < rows, WIDTH, BLOCK_D).to(tl.float32)
    tl.store(delta + row * heads + head, tl.sum(g * o, 1), mask=row < rows)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _dense_rows(
    grad_output,  # (rows, heads, width)
    query,  # (rows, heads, width)
    key,  # (slots, heads, width)
    value,  # (slots, heads, width)
    logsumexp,  # (rows, heads)
    delta,  # (rows, heads)
    seed,  # (1) int64 or None
    grad_query,  # (rows, heads, width)
    rows,
    slots,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    head, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    real_row = row < rows
    query, key = of_head(query, head, query_head), of_head(key, head, key_head)
    value = of_head(value, head, value_head)
    grad_output = of_head(grad_output, head, grad_output_head)
    q = load_rows(query, first_row, query_row, real_row, WIDTH, BLOCK_D)
    g = load_rows(grad_output, first_row, grad_output_row, real_row, WIDTH, BLOCK_D)
    statistic = tl.load(logsumexp + row * heads + head, mask=real_row, other=0)[:, None]
    own_delta = tl.load(delta + row * heads + head, mask=real_row, other=0)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, slots, BLOCK_N):
        real = first + tl.arange(0, BLOCK_N) < slots
        k = load_rows(key, first, key_slot, real, WIDTH, BLOCK_D)
        v = load_rows(value, first, value_slot, real, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        weights = tl.where(real[None], tl.exp(scores - statistic), 0.0)
        grad_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            keep = keep_tile(seed, threshold, row, head, first, BLOCK_N)
            grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
        grad_scores = weights * (grad_weights - own_delta) * scale
        total = tl.dot(grad_scores.to(k.dtype), k, total, input_precision=PRECISION)
    grad_query = of_head(grad_query, head, WIDTH)
    store_rows(grad_query, first_row, heads * WIDTH, real_row, total, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "share"])
def _dense_slots(
    grad_output,  # (rows, heads, width)
    query,  # (rows, heads, width)
    key,  # (slots, heads, width)
    value,  # (slots, heads, width)
    logsumexp,  # (rows, heads)
    delta,  # (rows, heads)
    seed,  # (1) int64 or None
    grad_key,  # (shares, slots, heads, width) or None
    grad_value,  # (shares, slots, heads, width) or None
    rows,
    share,  # rows a program sums over
    slots,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(slots, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    head, part = tl.program_id(0) // tiles % heads, tl.program_id(0) // tiles // heads
    real = first + tl.arange(0, BLOCK_N) < slots
    query, key = of_head(query, head, query_head), of_head(key, head, key_head)
    value = of_head(value, head, value_head)
    grad_output = of_head(grad_output, head, grad_output_head)
    k = load_rows(key, first, key_slot, real, WIDTH, BLOCK_D)
    v = load_rows(value, first, value_slot, real, WIDTH, BLOCK_D)
    key_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first_row in range(part * share, tl.minimum(part * share + share, rows), BLOCK_M):
        row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        real_row = row < rows
        q = load_rows(query, first_row, query_row, real_row, WIDTH, BLOCK_D)
        g = load_rows(grad_output, first_row, grad_output_row, real_row, WIDTH, BLOCK_D)
        place = row * heads + head
        # Rows that are not there weigh nothing.
        statistic = tl.load(logsumexp + place, mask=real_row, other=float("inf"))[None]
        own_delta = tl.load(delta + place, mask=real_row, other=0)[None]
        # All tiles are transposed, (BLOCK_N, BLOCK_M), so that the totals are plain products.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        weights = tl.exp(scores - statistic)
        grad_weights = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        kept_weights = weights
        if seed is not None:
            keep = tl.trans(keep_tile(seed, threshold, row, head, first, BLOCK_N))
            kept_weights = tl.where(keep, weights * kept_scale, 0.0)
            grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
        if grad_value is not None:
            value_total = tl.dot(
                kept_weights.to(g.dtype), g, value_total, input_precision=PRECISION
            )
        if grad_key is not None:
            grad_scores = weights * (grad_weights - own_delta) * scale
            key_total = tl.dot(grad_scores.to(q.dtype), q, key_total, input_precision=PRECISION)
    by_part = part.to(tl.int64) * slots * heads * WIDTH
    if grad_key is not None:
        place = of_head(grad_key, head, WIDTH) + by_part
        store_rows(place, first, heads * WIDTH, real, key_total, WIDTH, BLOCK_D)
    if grad_value is not None:
        place = of_head(grad_value, head, WIDTH) + by_part
        store_rows(place, first, heads * WIDTH, real, value_total, WIDTH, BLOCK_D)


def memory_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    memory_key: torch.Tensor,
    memory_value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    need_query: bool,
    need_memory_key: bool,
    need_memory_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, memory_key and memory_value, empty where not needed."""
    needs = (need_query, need_memory_key, need_memory_value)
    tensors = (query, memory_key, memory_value)
    if query.numel() == 0 or not any(needs):
        return tuple(
            t.new_zeros(t.shape if needed else 0) for t, needed in zip(tensors, needs, strict=True)
        )
    names = ("grad_output", "query", "key", "value", "output")
    operands = {n: in_place(t) for n, t in zip(names, (grad_output, *tensors, output), strict=True)}
    operands["logsumexp"] = logsumexp.contiguous()
    dropout = {"scale": scale, **dropout_arguments(dropout_p, dropout_seed)}
    if indices.shape[2] == 0:
        gradients = _gradients(operands, dropout, *needs)
    else:
        indices = indices.contiguous()
        gradients = memory_attention_topk_backward.gradients(operands, indices, dropout, *needs)
    return tuple(query.new_empty(0) if grad is None else grad for grad in gradients)


def _gradients(operands, dropout, need_query, need_key, need_value) -> list[torch.Tensor | None]:
    query, slots = operands["query"], operands["key"].shape[0]
    rows, heads, width = query.shape
    D = block_d(width)
    sizes = {"rows": rows, "heads": heads, "WIDTH": width, "BLOCK_D": D}
    delta = torch.empty_like(operands["logsumexp"])
    row = launch(STEM, "_delta", query, str(D))
    _delta[(triton.cdiv(rows, row["BLOCK_M"]) * heads,)](
        **strided(operands, "grad_output", "output"), delta=delta, **sizes, **row
    )
    sizes |= {"slots": slots, "PRECISION": precision(), **dropout}
    sizes |= {"logsumexp": operands["logsumexp"], "delta": delta}
    sizes |= strided(operands, "grad_output", "query", "key", "value")
    grad_query = None
    if need_query:
        grad_query = query.new_empty(query.shape)
        row = launch(STEM, "_dense_rows", query, str(D))
        grid = (triton.cdiv(rows, row["BLOCK_M"]) * heads,)
        _dense_rows[grid](grad_query=grad_query, **sizes, **row)
    if not (need_key or need_value):
        return [grad_query, None, None]
    row = launch(STEM, "_dense_slots", query, str(D))
    programs = triton.cdiv(slots, row["BLOCK_N"]) * heads
    tiles = triton.cdiv(rows, row["BLOCK_M"])
    parts = min(triton.cdiv(PROGRAMS, programs), tiles)
    # Sums of parts are added in float32.
    shape, dtype = (parts, slots, heads, width), query.dtype if parts == 1 else torch.float32
    bank = [query.new_empty(shape, dtype=dtype) if n else None for n in (need_key, need_value)]
    share = triton.cdiv(tiles, parts) * row["BLOCK_M"]
    _dense_slots[(programs * parts,)](
        grad_key=bank[0], grad_value=bank[1], share=share, **sizes, **row
    )
    if parts == 1:
        return [grad_query, *(grad if grad is None else grad[0] for grad in bank)]
    return [grad_query, *(grad if grad is None else grad.sum(0).to(query.dtype) for grad in bank)]


def compile_cases() -> "Iterator[Case]":
    """Every kernel of the backward in every row of the table, all gradients needed."""
    yield from cases(_delta, {"": {}}, uses_dot=False)
    yield from cases(_dense_rows, DROPOUT_VARIANTS)
    in_parts = dict.fromkeys(("grad_key", "grad_value"), torch.float32)
    yield from cases(_dense_slots, {n: v | in_parts for n, v in DROPOUT_VARIANTS.items()})
    yield from cases(_dense_slots, {" dropout one part": {}})
    yield from memory_attention_topk_backward.compile_cases()
