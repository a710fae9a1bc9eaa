"""Attention of many rows to the best slots of one bank: selection, softmax and weighted sum.

Two kernels follow each other, and three quantities:

    bound       the K-th largest of the maxima of BLOCK_N groups of slots (n % BLOCK_N), which
                costs one operation a score and is never above the K-th largest score
    candidates  the slots that score at least the bound, in order of their numbers: 36 of 2,048 on
                average for K = 32 and independent scores
    best        the candidates that fewer than K others precede, by score, then by number

A row whose candidates do not fit its 2 K places (many equal scores, or the best all in a few
groups) has its K-th score found bit by bit, by counting over the whole bank. That is 32 times the
work, so it is done only by the programs that hold such a row.
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


@triton.jit
def _ordered(scores):
    """uint32 in the order of the float32 scores; -0 equals +0, and NaN is above all."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) | -(2**31))
    return tl.where(scores != scores, -1, bits).to(tl.uint32, bitcast=True)


@triton.jit
def _unordered(order):
    """The scores of which `_ordered` made uint32."""
    bits = order.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -(2**31))).to(tl.float32, bitcast=True)


@triton.jit
def _bit(number):
    """2**(31 - number) as uint32."""
    return tl.full((), 2**31, tl.uint32) >> number


@triton.jit
def _scores(
    tile,  # of _candidates
    first,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """Scaled scores (M, BLOCK_N) on slots from the first on; -inf beyond the last.

    The same bits whenever called. float32 is multiplied as it is, so that ties stay ties, and
    STEP_D columns at a time, since Triton unrolls such a product in registers.
    """
    q, query, by_row, real_row, key, by_slot, slots, width, scale = tile
    real = first + tl.arange(0, BLOCK_N) < slots
    key += tl.cast(first, tl.int64) * by_slot
    if STEP_D == BLOCK_D:
        k = load_rows(key, 0, by_slot, real, width, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        scores = tl.zeros((real_row.shape[0], BLOCK_N), tl.float32)
        for d in range(0, width, STEP_D):
            a = load_rows(query + d, 0, by_row, real_row, width - d, STEP_D)
            b = load_rows(key + d, 0, by_slot, real, width - d, STEP_D)
            scores = tl.dot(a, tl.trans(b), scores, input_precision="ieee")
    return tl.where(real[None], scores * scale, -float("inf"))


@triton.jit
def _groups_bound(
    tile,  # of _candidates
    topk,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """The K-th largest of the groups' maxima (M): at least K scores are not below it."""
    slots = tile[6]
    best = tl.full((tile[3].shape[0], BLOCK_N), -float("inf"), tl.float32)
    for first in range(0, slots, BLOCK_N):
        scores = _scores(tile, first, BLOCK_N, BLOCK_D, STEP_D)
        best = tl.maximum(best, scores, propagate_nan=tl.PropagateNan.ALL)
    order = _ordered(best)
    bound = tl.zeros((order.shape[0],), tl.uint32)
    for i in range(32):
        trial = bound | _bit(i)
        enough = tl.sum((order >= trial[:, None]).to(tl.int32), 1) >= topk
        bound = tl.where(enough, trial, bound)
    return _unordered(bound)


@triton.jit
def _exact_bound(
    tile,  # of _candidates
    topk,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """The K-th largest score (M), as `_ordered` makes it."""
    slots = tile[6]
    bound = tl.zeros((tile[3].shape[0],), tl.uint32)
    for i in range(32):
        trial = bound | _bit(i)
        count = tl.zeros(bound.shape, tl.int32)
        for first in range(0, slots, BLOCK_N):
            order = _ordered(_scores(tile, first, BLOCK_N, BLOCK_D, STEP_D))
            real = first + tl.arange(0, BLOCK_N) < slots
            count += tl.sum(((order >= trial[:, None]) & real[None]).to(tl.int32), 1)
        bound = tl.where(count >= topk, trial, bound)
    return bound


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _candidates(
    query,  # (rows, heads, width)
    key,  # (slots, heads, width)
    candidates,  # (rows, heads, CAPACITY) int64: bits of a score, and its slot
    counts,  # (rows, heads) int32
    topk,
    rows,
    slots,
    heads,
    query_row,
    query_head,
    key_slot,
    key_head,
    scale,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,  # redo what did not fit
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    head, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    place = row.to(tl.int64) * heads + head
    real = row < rows
    if EXACT:
        found = tl.load(counts + place, mask=real, other=topk)
        real = (found > CAPACITY) | (found < topk)
        if tl.max(real.to(tl.int32), 0) == 0:
            return
    query = of_head(query, head, query_head) + first_row.to(tl.int64) * query_row
    key = of_head(key, head, key_head)
    q = query
    if STEP_D == BLOCK_D:
        q = load_rows(query, 0, query_row, real, WIDTH, BLOCK_D)
    tile = (q, query, query_row, real, key, key_slot, slots, WIDTH, scale)
    if EXACT:
        bound = _exact_bound(tile, topk, BLOCK_N, BLOCK_D, STEP_D)
    else:
        bound = _groups_bound(tile, topk, BLOCK_N, BLOCK_D, STEP_D)
    own = (candidates + place * CAPACITY)[:, None]
    count = tl.zeros((BLOCK_M,), tl.int32)
    ties = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, slots, BLOCK_N):
        scores = _scores(tile, first, BLOCK_N, BLOCK_D, STEP_D)
        slot = first + tl.arange(0, BLOCK_N)
        if EXACT:  # of the slots that score the bound itself, the first K will do
            order = _ordered(scores)
            tie = ((order == bound[:, None]) & (slot < slots)[None]).to(tl.int32)
            early = ties[:, None] + tl.cumsum(tie, 1) <= topk
            chosen = (order > bound[:, None]) | ((tie != 0) & early)
            ties += tl.sum(tie, 1)
        else:
            chosen = ~(scores < bound[:, None]) & (slot < slots)[None]
        at = count[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
        there = chosen & (at < CAPACITY) & real[:, None]
        tl.store(own + at, (bits << 32) | slot[None], mask=there)
        count += tl.sum(chosen.to(tl.int32), 1)
    tl.store(counts + place, count, mask=real)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _best(
    value,  # (slots, heads, width)
    candidates,  # (rows, heads, CAPACITY) int64: bits of a score, and its slot
    counts,  # (rows, heads) int32
    seed,  # (1) int64 or None
    output,  # (rows, heads, width)
    logsumexp,  # (rows, heads)
    indices,  # (rows, heads, topk)
    topk,
    first,  # number of the first row
    rows,
    heads,
    value_slot,
    value_head,
    threshold: tl.uint32,
    kept_scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    head, first_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    place = row.to(tl.int64) * heads + head
    count = tl.load(counts + place, mask=row < rows, other=0)
    c = tl.arange(0, CAPACITY)
    real = c[None] < count[:, None]
    packed = tl.load(candidates + place[:, None] * CAPACITY + c[None], mask=real, other=0)
    slot = (packed & 0xFFFFFFFF).to(tl.int32)
    scores = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    # Distinct numbers in the order of choice, and 0 for no candidate.
    order = (_ordered(scores).to(tl.uint64) << 32) | (0x7FFFFFFF - slot).to(tl.uint64)
    order = tl.where(real, order, 0)
    before = tl.sum((order[:, None, :] > order[:, :, None]).to(tl.int32), 2)
    chosen = real & (before < topk)
    index = place[:, None] * topk + tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(indices + index, slot, mask=chosen)
    scores = tl.where(chosen, scores, -float("inf"))
    top = tl.max(scores, 1)
    weights = tl.where(chosen, tl.exp(scores - top[:, None]), 0.0)
    total = tl.sum(weights, 1)
    tl.store(logsumexp + place, top + tl.log(total), mask=row < rows)
    weights = weights / total[:, None]
    if seed is not None:
        keep = keep_slots(seed, threshold, first + row.to(tl.int64), head, slot)
        weights = tl.where(keep, weights * kept_scale, 0.0)
    v = gather_rows(of_head(value, head, value_head), slot, value_slot, chosen, WIDTH, BLOCK_D)
    mixed = tl.sum(weights[:, :, None] * v, 1)
    output = of_head(output, head, WIDTH)
    store_rows(output, first_row, heads * WIDTH, row < rows, mixed, WIDTH, BLOCK_D)


def attend_to_best(
    operands: dict[str, torch.Tensor],
    scale: float,
    dropout: dict[str, object],
    first: int,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Fills the results for rows of which `first` is the first one's number."""
    query = operands["query"]
    (rows, heads, width), topk = query.shape, indices.shape[2]
    D, capacity = block_d(width), 2 * block_k(topk)
    candidates = query.new_empty((rows, heads, capacity), dtype=torch.int64)
    counts = query.new_empty((rows, heads), dtype=torch.int32)
    common = {"candidates": candidates, "counts": counts, "topk": topk, "CAPACITY": capacity}
    common |= {"rows": rows, "heads": heads, "WIDTH": width, "BLOCK_D": D}
    row = launch(STEM, "_candidates", query, str(D))
    for exact in (False, True):
        _candidates[(triton.cdiv(rows, row["BLOCK_M"]) * heads,)](
            slots=operands["key"].shape[0],
            scale=scale,
            EXACT=exact,
            **strided(operands, "query", "key"),
            **common,
            **row,
        )
    row = launch(STEM, "_best", query, f"{D}x{capacity // 2}")
    _best[(triton.cdiv(rows, row["BLOCK_M"]) * heads,)](
        output=output,
        logsumexp=logsumexp,
        indices=indices,
        first=first,
        **strided(operands, "value"),
        **common,
        **dropout,
        **row,
    )


def compile_cases() -> "Iterator[Case]":
    """Every kernel in every row of the table."""
    yield from cases(_candidates, {"": {"EXACT": False}, " exact": {"EXACT": True}})
    yield from cases(_best, DROPOUT_VARIANTS, uses_dot=False)
