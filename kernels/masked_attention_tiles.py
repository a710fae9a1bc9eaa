"""What masked attention's forward and backward share: where rows lie, tiles, scores, dropout.

Padded and packed sequences are one case. An item is a sample of the padded form, or a sequence of
the packed one, whose steps from item to item are 0 and whose rows start at its offset.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels.launch import DTYPES, SHARED_MEMORY, find, table, tf32_allowed
from mpma_ext.kernels.philox import dropout_words

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

STEM = "masked_attention"
# Compiled once whatever their values: lengths and batches change from step to step.
SIZES = ["heads", "items", "queries", "keys", "query_rows", "key_rows", "threshold"]
LARGEST_TILE = 256  # rows
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def extent(
    cu_seqlens,  # (items + 1) or None
    item,
    items,
    rows,
    longest,
):
    """First row, length and end of an item.

    Of packed sequences, items -1 and `items` are the rows before the first and after the last: of
    length 0, so that whoever clears from start + length to the end leaves no row unwritten.
    Whatever the offsets hold, nothing lies outside [0, rows).
    """
    if cu_seqlens is None:
        return item * 0, longest, longest
    else:
        start = tl.load(cu_seqlens + item, mask=item >= 0, other=0)
        stop = tl.load(cu_seqlens + item + 1, mask=item < items, other=rows)
        start = tl.minimum(tl.maximum(start, 0), rows)
        stop = tl.minimum(tl.maximum(stop, start), rows)
        is_sequence = (item >= 0) & (item < items)
        return start, tl.where(is_sequence, tl.minimum(stop - start, longest), 0), stop


@triton.jit
def origin(
    pointer,
    steps,  # of an item, a row and a head
    item,
    row,
    head,
):
    """Pointer to one row of one head; 64-bit, since an operand may pass 2**31 elements."""
    item, row, head = item.to(tl.int64), row.to(tl.int64), head.to(tl.int64)
    return pointer + item * steps[0] + row * steps[1] + head * steps[2]


@triton.jit
def statistic_origin(
    pointer,  # (items, heads, rows), packed (heads, rows)
    cu_seqlens,  # None where not packed
    item,
    row,
    heads,
    head,
    rows,
):
    """Pointer to one row's statistic of one head; 64-bit as well."""
    line = tl.cast(head, tl.int64)
    if cu_seqlens is None:
        line += tl.cast(item, tl.int64) * heads
    return pointer + line * rows + row


@triton.jit
def rows_of(
    pointer,  # (rows, WIDTH)
    first,
    by_row,
    real,  # (M) bool
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pointers to M rows from the first on, (M, BLOCK_D), and which of them are there.

    Within a tile 32 bits do (see `in_place`), and take half the registers.
    """
    d = tl.arange(0, BLOCK_D)
    there = real[:, None]
    if WIDTH < BLOCK_D:
        there = there & (d < WIDTH)[None]
    offset = tl.arange(0, real.shape[0])[:, None] * by_row + d[None]
    return pointer + tl.cast(first, tl.int64) * by_row + offset, there


@triton.jit
def load_rows(pointer, first, by_row, real, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (M, BLOCK_D); 0 for what is not real, whatever lies there."""
    place, there = rows_of(pointer, first, by_row, real, WIDTH, BLOCK_D)
    return tl.load(place, mask=there, other=0)


@triton.jit
def store_rows(pointer, first, by_row, real, tile, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a tile (M, BLOCK_D) in the pointer's dtype."""
    place, there = rows_of(pointer, first, by_row, real, WIDTH, BLOCK_D)
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def clear_rows(
    pointer,
    first,
    last,
    stride,
    by_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros in BLOCK rows at first and at every stride after it, up to last."""
    for start in range(first, last, stride):
        there = start + tl.arange(0, BLOCK) < last
        zeros = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        store_rows(pointer, start, by_row, there, zeros, WIDTH, BLOCK_D)


@triton.jit
def real_keys(
    mask,  # (keys) bool, of one item, or None
    j,  # (N)
    length,
):
    """Which keys may be attended to (N)."""
    real = j < length
    if mask is not None:
        real = (tl.load(mask + j, mask=real, other=0) != 0) & real
    return real


@triton.jit
def kept(seed, threshold, item, head, i, first_key, BLOCK_N: tl.constexpr):
    """Which weights of queries i (M) on BLOCK_N keys dropout keeps (M, BLOCK_N).

    Args:
        seed: its two words.
        first_key: a multiple of four.
    """
    quad = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = dropout_words(seed[0], seed[1], quad[None], i[:, None], head, item)
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    return tl.join(even, odd).reshape(i.shape[0], BLOCK_N)


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where the kernels cannot read it: a row in pieces, or rows far apart."""
    near = tensor.stride(-1) == 1 and tensor.stride(-3) < 2**31 // LARGEST_TILE
    return tensor if near else tensor.contiguous()


def steps(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of items, rows and heads; 0 for those of items where a packed tensor has none."""
    if tensor is None:
        return (0, 0, 0)
    return (0,) * (4 - tensor.dim()) + tensor.stride()[:-1]


def block_d(width: int) -> int:
    """Columns of a tile."""
    return 32 if width <= 32 else 64 if width <= 64 else 128


def bucket(length: int, width: int, dropout_p: float) -> str:
    """Key of the launch table: the length that decides and the width, rounded up, and dropout."""
    rounded = next((str(n) for n in (64, 128, 256) if length <= n), "long")
    return f"{rounded}x{block_d(width)}" + ("-dropout" if dropout_p > 0 else "")


def precision() -> str:
    """How tl.dot is to multiply: float32 as three TF32 products, unless PyTorch allows one."""
    return "tf32" if tf32_allowed() else "tf32x3"


def rows(kernel: triton.runtime.JITFunction) -> Iterator[tuple[str, str, str, dict[str, int]]]:
    """Generation, dtype, bucket and launch of every row that serves a kernel."""
    buckets = table(STEM)[kernel.__name__]
    for generation in SHARED_MEMORY:
        for dtype in ("bfloat16", "float16", "float32"):
            for name in buckets["sm86"]["float32"]:
                yield generation, dtype, name, find(buckets, generation, dtype, name)


def case(
    kernel: triton.runtime.JITFunction,
    row: tuple[str, str, str, dict[str, int]],
    packed: bool,
    **others: object,
) -> "Case":
    """A kernel in one row, as it is launched for 12 heads of contiguous operands.

    Args:
        row: of `rows`.
        packed: sequences by their offsets, or else samples with a key padding mask.
        others: arguments that are not all kernels', or not always given.
    """
    from mpma_ext.kernels.compile import Case  # needed by nobody who only runs kernels

    generation, dtype, name, launched = row
    width = int(name.removesuffix("-dropout").split("x")[1])
    dropout = name.endswith("-dropout")
    (operand,) = (key for key, value in DTYPES.items() if value == dtype)
    values = dict.fromkeys(kernel.arg_names, operand)
    values |= {n: (0 if packed else 197 * 12 * width, 12 * width, width) for n in _steps(kernel)}
    values |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.int32 if packed else None)
    values |= {"key_padding_mask": None if packed else torch.bool}
    values |= {"dropout_seed": torch.int64 if dropout else None}
    values |= dict.fromkeys(("logsumexp", "delta"), torch.float32) | dict.fromkeys(SIZES, 197)
    values |= {"scale": width**-0.5, "kept_scale": 1.25, "WIDTH": width, "DROPOUT": dropout}
    values |= {"PRECISION": "tf32x3", "BLOCK_D": width, **launched, **others}
    return Case(
        name=f"{STEM}.{kernel.__name__} {dtype} {name}" + " packed" * packed,
        kernel=kernel,
        arguments={n: values[n] for n in kernel.arg_names},
        num_warps=launched["num_warps"],
        num_stages=launched["num_stages"],
        generation=generation,
    )


def _steps(kernel: triton.runtime.JITFunction) -> list[str]:
    return [name for name in kernel.arg_names if name.endswith("_steps")]
