"""Attention to a bank of memory slots that the whole batch shares, over the best slots of a row."""

import math

import torch

from mpma_ext.reference.philox import dropped, memory_dropout_keep, seed_tensor
from mpma_ext.reference.precision import compute_dtype, outside_autocast


@outside_autocast
def memory_attention(
    query: torch.Tensor,
    memory_key: torch.Tensor,
    memory_value: torch.Tensor,
    *,
    topk: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Weighted sum of memory values over the `topk` slots whose keys score highest.

    scores = scale · ⟨query, memory_key⟩ over the N slots; the K largest of each row and head are
    kept, ties going to the lower slot; softmax over what is kept. The memory of Chen et al.,
    "Cross-modal memory networks for radiology report generation" (ACL 2021), projected once.

    Args:
        query: (..., H, D).
        memory_key, memory_value: (N, H, D).
        topk: K; None, or K >= N, keeps every slot.
        scale: D**-0.5 by default.
        dropout_p, dropout_seed: weights are dropped after the softmax, by Philox.

    Returns:
        query's shape and dtype. Gradients flow through the kept slots only.
    """
    dtype = compute_dtype(query)
    slots, heads, width = memory_key.shape
    scale = width**-0.5 if scale is None else scale
    q = query.reshape(math.prod(query.shape[:-2]), heads, width).to(dtype)
    k, v = memory_key.to(dtype), memory_value.to(dtype)
    scores = torch.einsum("rhd,nhd->rhn", q, k) * scale
    kept = None
    if topk is not None and topk < slots:
        kept = best_slots(scores.detach(), topk)
        scores = scores.gather(-1, kept)
    weights = scores.softmax(-1)
    if dropout_p > 0:
        seed = seed_tensor(dropout_seed, query.device)
        numbers = torch.arange(slots, device=q.device).expand(*scores.shape[:2], -1)
        keep = memory_dropout_keep(seed, dropout_p, numbers if kept is None else kept)
        weights = dropped(weights, keep, dropout_p)
    if kept is None:
        output = torch.einsum("rhn,nhd->rhd", weights, v)
    else:
        # Rows of the bank laid out head by head.
        first = slots * torch.arange(heads, device=q.device).view(1, -1, 1)
        values = v.transpose(0, 1).reshape(-1, width).index_select(0, (first + kept).flatten())
        output = torch.einsum("rhk,rhkd->rhd", weights, values.view(*kept.shape, width))
    return output.to(query.dtype).reshape(query.shape)


def best_slots(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Numbers of the `topk` largest of (R, H, N) scores, ascending; ties go to the lower number."""
    # Adding zero turns -0 into +0, which a radix sort would otherwise tell apart.
    order = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :topk].sort(-1).values
