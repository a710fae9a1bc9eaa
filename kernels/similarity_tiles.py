"""What both forms of token-patch similarity share: the product of a tile, and what is real."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mpma_ext.kernels.launch import DTYPES, SHARED_MEMORY, find, table, tf32_allowed

if TYPE_CHECKING:
    from mpma_ext.kernels.compile import Case

# Kernels are compiled once whatever these are: batches and lengths change from step to step.
NOT_SPECIALIZED = ["reports", "images", "T", "P"]


@triton.jit
def rows_of(side, item, position, within):
    """Pointers to rows, and which of them, within bounds, are real.

    A side is (rows, their strides over items and positions, mask (items, length) or None, length).
    """
    rows, by_item, by_position, mask, length = side
    item, position = item.to(tl.int64), position.to(tl.int64)
    real = within
    if mask is not None:
        real = (tl.load(mask + item * length + position, mask=within, other=0) != 0) & within
    return rows + item * by_item + position * by_position, real


@triton.jit
def scores_of(
    rows,  # (M) pointers
    real_row,  # (M)
    columns,  # (N) pointers
    real_column,  # (N)
    width,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """⟨row, column⟩ (M, N) in float32, whatever the width; 0 for what is not real."""
    scores = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        within = d < width
        of_row = real_row[:, None] & within[None]
        of_column = real_column[None] & within[:, None]
        a = tl.load(rows[:, None] + d[None], mask=of_row, other=0)
        b = tl.load(columns[None] + d[:, None], mask=of_column, other=0)
        scores = tl.dot(a, b, scores, input_precision=PRECISION)
    return scores


def rows_in_place(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where the kernels could not read it row by row."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def packed(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that may be absent, without gaps."""
    return None if mask is None else mask.contiguous()


def precision(tensor: torch.Tensor) -> str:
    """How tl.dot is to multiply: float32 without TF32, unless PyTorch allows it."""
    return "tf32" if tensor.dtype == torch.float32 and tf32_allowed() else "ieee"


# What a launch says of 256 reports of 64 tokens and 256 images of 196 patches of 768 features.
LAUNCHED = {
    **{"reports": 256, "images": 256, "T": 64, "P": 196, "P_padded": 208, "D": 768},
    **{"tokens_item": 64 * 768, "tokens_row": 768, "patches_item": 196 * 768, "patches_row": 768},
    **{"attention_temperature": 4.0, "pooling_temperature": 5.0, "PRECISION": "ieee"},
}


def cases(
    stem: str,
    kernel: triton.runtime.JITFunction,
    tensors: Mapping[str, torch.dtype | None],
    arguments: Mapping[str, object],
    variant: str = "",
) -> "Iterator[Case]":
    """A kernel in every row of its table, for every generation.

    Args:
        tensors: their dtypes, None for the operands' own. One that is not given is None among the
            arguments.
        arguments: what LAUNCHED and the row do not say, or say otherwise. A row for 64 tokens is
            left out where they say more.
        variant: tells these arguments from others in the cases' names.
    """
    from mpma_ext.kernels.compile import Case  # needed by nobody who only runs kernels

    rows = table(stem)[kernel.__name__]
    for generation in SHARED_MEMORY:
        for dtype, name in DTYPES.items():
            for bucket in rows["sm86"]["float32"]:
                if bucket.startswith("64x") and arguments.get("T", 64) > 64:
                    continue
                row = dict(find(rows, generation, name, bucket))
                options = {"num_warps": row.pop("num_warps"), "num_stages": row.pop("num_stages")}
                values = {**LAUNCHED, **{n: of or dtype for n, of in tensors.items()}}
                values |= {**arguments, **row}
                yield Case(
                    name=f"{stem}.{kernel.__name__} {name} {bucket}{variant}",
                    kernel=kernel,
                    arguments={n: values[n] for n in kernel.arg_names},
                    generation=generation,
                    uses_dot="PRECISION" in kernel.arg_names and dtype != torch.float32,
                    **options,
                )
