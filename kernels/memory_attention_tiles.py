"""What memory attention's forward and backward share: tiles of rows, gathered rows, dropout.

Everything is per head: pointers to rows come with the head's offset already added.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels.launch import DTYPES, SHARED_MEMORY, find, table, tf32_allowed
from mpma_ext.kernels.philox import dropout_threshold, dropout_words, seed_words

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

STEM = "memory_attention"
LARGEST_TILE = 256  # rows
# Kernels are compiled once whatever these are: the batch changes from step to step. The width is a
# constant, which saves registers.
NOT_SPECIALIZED = ["rows", "first", "slots", "heads", "topk", "threshold"]
# What is compiled: without a seed and with one.
DROPOUT_VARIANTS = {"": {"seed": None}, " dropout": {}}


@triton.jit
def of_head(
    pointer,  # (rows, heads, width)
    head,
    by_head,
):
    """Pointer to a head's first row; 64-bit, since an operand may pass 2**31 elements."""
    return pointer + head.to(tl.int64) * by_head


@triton.jit
def row_pointers(
    pointer,  # (rows, width)
    first,
    by_row,
    real,  # (M) bool
    width,
    BLOCK_D: tl.constexpr,
):
    """Pointers to M rows from the first on, (M, BLOCK_D), and which elements are there.

    Within a tile 32 bits do (see `in_place`), and take half the registers.
    """
    d = tl.arange(0, BLOCK_D)
    offset = tl.arange(0, real.shape[0])[:, None] * by_row + d[None]
    return pointer + tl.cast(first, tl.int64) * by_row + offset, real[:, None] & (d < width)[None]


@triton.jit
def load_rows(pointer, first, by_row, real, width, BLOCK_D: tl.constexpr):
    """A tile (M, BLOCK_D); 0 for what is not real."""
    place, there = row_pointers(pointer, first, by_row, real, width, BLOCK_D)
    return tl.load(place, mask=there, other=0)


@triton.jit
def store_rows(pointer, first, by_row, real, tile, width, BLOCK_D: tl.constexpr):
    """Writes a tile (M, BLOCK_D) in the pointer's dtype."""
    place, there = row_pointers(pointer, first, by_row, real, width, BLOCK_D)
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def gather_rows(
    pointer,  # (rows, width)
    number,  # (M, C) or (M)
    by_row,
    real,  # like number
    width,
    BLOCK_D: tl.constexpr,
):
    """Rows by their numbers in float32, (M, C, BLOCK_D) or (M, BLOCK_D); 0 for what is not real."""
    d = tl.arange(0, BLOCK_D)
    place = pointer + tl.expand_dims(number.to(tl.int64) * by_row, -1) + d
    there = tl.expand_dims(real, -1) & (d < width)
    return tl.load(place, mask=there, other=0).to(tl.float32)


@triton.jit
def keep_slots(
    seed,  # (1) int64
    threshold,
    row,  # (M) int64
    head,
    slot,  # (M, C)
):
    """Which weights of rows on any slots dropout keeps (M, C)."""
    low, high = seed_words(seed)
    c2, c3 = (row & 0xFFFFFFFF)[:, None], (row >> 32)[:, None]
    w0, w1, w2, w3 = dropout_words(low, high, slot // 4, head, c2, c3)
    even, odd = tl.where(slot % 4 == 0, w0, w2), tl.where(slot % 4 == 1, w1, w3)
    return tl.where(slot % 2 == 0, even, odd) >= threshold


@triton.jit
def keep_tile(
    seed,  # (1) int64
    threshold,
    row,  # (M) int64
    head,
    first,
    BLOCK_N: tl.constexpr,
):
    """The same (M, BLOCK_N) on the slots from `first` on, a multiple of four."""
    low, high = seed_words(seed)
    quad = (first // 4 + tl.arange(0, BLOCK_N // 4))[None]
    c2, c3 = (row & 0xFFFFFFFF)[:, None], (row >> 32)[:, None]
    w0, w1, w2, w3 = dropout_words(low, high, quad, head, c2, c3)
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    return tl.join(even, odd).reshape(row.shape[0], BLOCK_N)


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where the kernels cannot read it: a row in pieces, or rows far apart."""
    near = tensor.stride(2) == 1 and tensor.stride(0) < 2**31 // LARGEST_TILE
    return tensor if near else tensor.contiguous()


def dropout_arguments(dropout_p: float, seed: torch.Tensor | None) -> dict[str, object]:
    """How kernels are told of dropout; no seed, no dropout."""
    dropping = dropout_p > 0
    return {
        "seed": seed if dropping else None,
        "threshold": dropout_threshold(dropout_p),
        "kept_scale": 1 / (1 - dropout_p),
    }


def strided(operands: dict[str, torch.Tensor], *names: str) -> dict[str, object]:
    """Arguments for operands and their strides."""
    arguments = {name: operands[name] for name in names}
    for name in names:
        of = "slot" if name in ("key", "value") else "row"
        arguments[f"{name}_{of}"], arguments[f"{name}_head"], _ = operands[name].stride()
    return arguments


def block_d(width: int) -> int:
    """Columns of a tile."""
    return 32 if width <= 32 else 64 if width <= 64 else 128


def block_k(topk: int) -> int:
    """Columns of a tile of a row's best slots."""
    return 32 if topk <= 32 else 64


def precision() -> str:
    """How tl.dot is to multiply: float32 as three TF32 products, unless PyTorch allows one."""
    return "tf32" if tf32_allowed() else "tf32x3"


def cases(
    kernel: triton.runtime.JITFunction,
    variants: Mapping[str, Mapping[str, object]],
    uses_dot: bool = True,
) -> "Iterator[Case]":
    """A kernel in every row of its table for every generation, with 12 heads.

    Args:
        variants: arguments that a bucket does not decide, by what tells them in a case's name.
    """
    from mpma_ext.kernels.compile import Case  # needed by nobody who only runs kernels

    names, rows = kernel.arg_names, table(STEM)[kernel.__name__]
    for generation in SHARED_MEMORY:
        for dtype, short in DTYPES.items():
            for bucket, (variant, flags) in product(rows["sm86"]["float32"], variants.items()):
                row = dict(find(rows, generation, short, bucket))
                options = {"num_warps": row.pop("num_warps"), "num_stages": row.pop("num_stages")}
                values = {**_launched(names, dtype, bucket), **row, **flags}
                yield Case(
                    name=f"{STEM}.{kernel.__name__} {short} {bucket}{variant}",
                    kernel=kernel,
                    arguments={name: values[name] for name in names},
                    generation=generation,
                    uses_dot=uses_dot and dtype != torch.float32,
                    **options,
                )


def _launched(names: Iterable[str], dtype: torch.dtype, bucket: str) -> dict[str, object]:
    """What a launch says in a bucket: the width, and the columns of a tile of best slots."""
    width, *best = map(int, bucket.split("x"))
    best = best[0] if best else 32
    values = dict.fromkeys(names, dtype)
    values |= dict.fromkeys(("candidates", "seed", "order", "starts"), torch.int64)
    values |= dict.fromkeys(("counts", "indices"), torch.int32)
    values |= dict.fromkeys(("logsumexp", "delta", "coefficients"), torch.float32)
    values |= {"rows": 12800, "first": 0, "share": 12800, "slots": 2048, "heads": 12}
    values |= {"WIDTH": width, "topk": best, "scale": width**-0.5}
    values |= {"threshold": 2**29, "kept_scale": 1.25, "PRECISION": "tf32x3"}
    values |= {"BLOCK_D": width, "CAPACITY": 2 * best, "BLOCK_K": best}
    values |= {name: 12 * width for name in names if name.endswith(("_row", "_slot"))}
    return values | {name: width for name in names if name.endswith("_head")}
