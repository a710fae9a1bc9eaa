"""Reports laid end to end: padding is dropped once, and every later layer works on real tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PackedText:
    """Where the real tokens of a right-padded batch lie.

    Attributes:
        rows: (N,) int64, place of each real token among the B·T of the batch, in reading order.
        position_ids: (N,) int64, place of each real token in its report.
        cu_seqlens: (B + 1,) int32, where each report starts among the N tokens.
        batch, length: B and T.
    """

    rows: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    batch: int
    length: int

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...)."""
        return padded.flatten(0, 1).index_select(0, self.rows)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...), zero in the padding."""
        flat = packed.new_zeros(self.batch * self.length, *packed.shape[1:])
        return flat.index_copy(0, self.rows, packed).unflatten(0, (self.batch, self.length))


def pack_text(input_ids: Tensor, attention_mask: Tensor, vocab_size: int) -> PackedText:
    """Find the real tokens of a batch. Waits for the device once, to know how many there are.

    Args:
        input_ids: (B, T) int64, below vocab_size.
        attention_mask: (B, T), 1 = real; each report has a token, and its padding is on the right.

    Raises:
        ValueError: a report without a token, padding that is not on the right, or an unknown id.
    """
    batch, length = input_ids.shape
    real = attention_mask.bool()
    empty = ~real.any(dim=1)
    gap = (real[:, 1:] & ~real[:, :-1]).any(dim=1)
    unknown = (real & ((input_ids < 0) | (input_ids >= vocab_size))).any(dim=1)
    counts = torch.stack([real.sum(), empty.sum(), gap.sum(), unknown.sum()]).tolist()
    total, *faults = counts
    for fault, what in zip(
        faults,
        (
            "attention_mask: each report must have a real token (its [CLS]); reports without one",
            "attention_mask: padding must be on the right only; reports where it is not",
            f"input_ids: must be 0 or more and below vocab_size {vocab_size}; reports where not",
        ),
        strict=True,
    ):
        if fault:
            raise ValueError(f"{what}: {fault} of {batch}")
    rows = torch.nonzero_static(real.flatten(), size=total).squeeze(1)
    lengths = real.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return PackedText(rows, rows % max(length, 1), cu_seqlens, batch, length)
