"""Attention to a bank of memory slots in plain PyTorch.

query (B, L, H, D), memory_key and memory_value (N, H, D); topk None keeps all N slots; the scale is
D**-0.5. (B, L, H, D) in query's dtype comes back.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from benchmarks.baselines.compiled import compiled


def field(
    query: Tensor, memory_key: Tensor, memory_value: Tensor, *, topk: int | None = None
) -> Tensor:
    """As memory networks for report generation do (Chen et al., ACL 2021): the bank expanded.

    Values are gathered from (B, H, L, N, D), whose gradient is that large in memory.
    """
    batch, length, _, width = query.shape
    q = query.transpose(1, 2)
    k, v = (x.transpose(0, 1).expand(batch, -1, -1, -1) for x in (memory_key, memory_value))
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(width)
    if topk is None:
        return torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous()
    best, slots = scores.topk(topk, dim=-1)
    candidates = v.unsqueeze(2).expand(-1, -1, length, -1, -1)
    chosen = candidates.gather(3, slots.unsqueeze(-1).expand(-1, -1, -1, -1, width))
    output = torch.matmul(best.softmax(-1).unsqueeze(3), chosen).squeeze(3)
    return output.transpose(1, 2).contiguous()


def eager(
    query: Tensor, memory_key: Tensor, memory_value: Tensor, *, topk: int | None = None
) -> Tensor:
    """The rows of the batch flattened into one product a head; topk, then a gather of values."""
    scores, v = _scores(query, memory_key), memory_value.transpose(0, 1)
    if topk is None:
        return _rows(torch.bmm(scores.softmax(-1), v), query)
    best, slots = scores.topk(topk, dim=-1)
    chosen = v.flatten(0, 1).index_select(0, _bank_rows(slots, v).flatten())
    chosen = chosen.view(*slots.shape, -1)
    return _rows(torch.matmul(best.softmax(-1).unsqueeze(2), chosen).squeeze(2), query)


def eager_bag(query: Tensor, memory_key: Tensor, memory_value: Tensor, *, topk: int) -> Tensor:
    """Gather and weighted sum in one embedding_bag, so that no chosen value is copied."""
    scores, v = _scores(query, memory_key), memory_value.transpose(0, 1)
    best, slots = scores.topk(topk, dim=-1)
    output = embedding_bag(
        _bank_rows(slots, v).flatten(0, 1),
        v.flatten(0, 1),
        per_sample_weights=best.softmax(-1).flatten(0, 1),
        mode="sum",
    )
    return _rows(output.unflatten(0, slots.shape[:2]), query)


def eager_masked(query: Tensor, memory_key: Tensor, memory_value: Tensor, *, topk: int) -> Tensor:
    """No gather: scores below the topk-th are masked, and the softmax meets the whole bank."""
    scores = _scores(query, memory_key)
    least = scores.detach().topk(topk, dim=-1).values[..., -1:]
    weights = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
    return _rows(torch.bmm(weights, memory_value.transpose(0, 1)), query)


def sdpa(query: Tensor, memory_key: Tensor, memory_value: Tensor, *, topk: None = None) -> Tensor:
    """PyTorch's fused attention on one problem whose queries are all rows of the batch."""
    rows = query.flatten(0, 1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (rows, memory_key, memory_value))
    return _rows(scaled_dot_product_attention(q, k, v).squeeze(0), query)


def sdpa_expanded(
    query: Tensor, memory_key: Tensor, memory_value: Tensor, *, topk: None = None
) -> Tensor:
    """PyTorch's fused attention with the bank expanded to every sample."""
    batch = query.shape[0]
    k, v = (x.transpose(0, 1).expand(batch, -1, -1, -1) for x in (memory_key, memory_value))
    output = scaled_dot_product_attention(query.transpose(1, 2), k, v)
    return output.transpose(1, 2).contiguous()


def _scores(query: Tensor, memory_key: Tensor) -> Tensor:
    """Scaled scores (H, R, N) of the R = B·L flattened rows."""
    rows = query.flatten(0, 1).transpose(0, 1) * query.shape[-1] ** -0.5
    return torch.bmm(rows, memory_key.permute(1, 2, 0))


def _rows(output: Tensor, query: Tensor) -> Tensor:
    """(H, R, D) in query's shape (B, L, H, D)."""
    return output.transpose(0, 1).reshape(query.shape)


def _bank_rows(slots: Tensor, values: Tensor) -> Tensor:
    """Slot numbers (H, R, K) as row numbers of the bank (H, N, D) laid out head by head."""
    heads, count, _ = values.shape
    return slots + count * torch.arange(heads, device=slots.device).view(-1, 1, 1)


BASELINES = {
    "field": field,
    "eager": eager,
    "eager_bag": eager_bag,
    "eager_masked": eager_masked,
    "compiled": compiled(eager),
    "sdpa": sdpa,
    "sdpa_expanded": sdpa_expanded,
}
