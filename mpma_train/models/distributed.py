"""The global batch: what a loss over all ranks needs of the others, with exact gradients.

Losses are written so that the mean over ranks is the loss of the global batch. DDP averages
gradients over ranks too, so a rank's loss counts its own rows once, and the gradient that other
ranks' rows send to its features is summed, not averaged.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """How many processes share the batch; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    """all_gather forward, reduce_scatter backward."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, ...) of every rank, in the order of ranks: (W·B, ...). B is the same everywhere."""
    if world_size() == 1:
        return rows
    if rows.dtype == torch.bool:
        return _GatherRows.apply(rows.to(torch.uint8)).bool()
    return _GatherRows.apply(rows)


def pad_length(rows: Tensor, length: int) -> Tensor:
    """(B, T, ...) to (B, length, ...), zeros at the end."""
    return F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, length - rows.shape[1]))


def gather_counts(counts: Tensor) -> Tensor:
    """Integer counts (n,) of every rank: (W, n), on the same device."""
    return gather_rows(counts.unsqueeze(0))


def global_counts(batch: int, length: int, targets: Tensor) -> tuple[int, Tensor]:
    """What the ranks must agree on: the longest report and the number of report targets.

    Args:
        batch, length: B and T of this rank.
        targets: 0-dimensional, how many tokens of this rank's reports are predicted.

    Returns:
        The longest T of all ranks, and the mean over ranks of `targets`.

    Raises:
        ValueError: the ranks hold batches of different sizes.
    """
    if world_size() == 1:
        return length, targets
    own = torch.tensor([batch, length], device=targets.device)
    counts = gather_counts(torch.cat([own, targets.reshape(1).to(own.dtype)]))
    sizes, lengths = counts[:, 0].tolist(), counts[:, 1].tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"every rank must hold a batch of the same size, got {sizes}; drop the last incomplete "
            "batch (dataloader_drop_last)"
        )
    return max(lengths), counts[:, 2].double().mean()
