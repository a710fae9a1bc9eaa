"""Attention with key padding, in its padded, packed-projection and packed-sequence forms."""

import torch

from mpma_ext.reference.philox import attention_dropout_keep, dropped, seed_tensor
from mpma_ext.reference.precision import compute_dtype, masked_softmax, outside_autocast


@outside_autocast
def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """softmax(scale · query keyᵀ) value over the keys that are to be attended to.

    Args:
        query: (B, Sq, H, D).
        key, value: (B, Sk, H, D).
        key_padding_mask: (B, Sk) bool, True = attend.
        scale: D**-0.5 by default.
        dropout_p, dropout_seed: weights are dropped after the softmax, by Philox.

    Returns:
        (B, Sq, H, D) in query's dtype; 0 for a row with no key to attend to.
    """
    dtype = compute_dtype(query)
    batch, queries, heads, width = query.shape
    keys = key.shape[1]
    scale = width**-0.5 if scale is None else scale
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    attend = None
    if key_padding_mask is not None:
        # What is masked may hold NaN: it must not even be multiplied by a zero weight.
        padding = ~key_padding_mask[:, :, None, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        attend = key_padding_mask[:, None, None, :]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = masked_softmax(scores, attend, dim=-1)
    if dropout_p > 0:
        seed = seed_tensor(dropout_seed, query.device)
        keep = attention_dropout_keep(seed, dropout_p, batch, heads, queries, keys)
        weights = dropped(weights, keep, dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(query.dtype).contiguous()


def masked_attention_qkvpacked(
    qkv: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`masked_attention` on one packed projection.

    Args:
        qkv: (B, S, 3, H, D), query, key and value in this order.
        key_padding_mask, scale, dropout_p, dropout_seed: as in `masked_attention`.

    Returns:
        (B, S, H, D).
    """
    query, key, value = qkv.unbind(2)
    return masked_attention(
        query,
        key,
        value,
        key_padding_mask=key_padding_mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )


def masked_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`masked_attention` on packed sequences: unpacked to padded ones, attended, packed again.

    Args:
        query: (Nq, H, D), the sequences one after the other.
        key, value: (Nk, H, D).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where each sequence starts, from 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        scale, dropout_p, dropout_seed: as in `masked_attention`.

    Returns:
        (Nq, H, D); 0 in the rows after the last sequence.
    """
    query_slots, _ = _padded_slots(cu_seqlens_q, max_seqlen_q, query.shape[0])
    key_slots, key_padding_mask = _padded_slots(cu_seqlens_k, max_seqlen_k, key.shape[0])
    padded = masked_attention(
        _take(query, query_slots),
        _take(key, key_slots),
        _take(value, key_slots),
        key_padding_mask=key_padding_mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    position = torch.arange(query.shape[0], device=query.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].long(), position, right=True)
    start = torch.cat([cu_seqlens_q.long(), cu_seqlens_q.new_zeros(1)])[sequence]
    offset = position - start
    inside = (sequence < cu_seqlens_q.shape[0] - 1) & (offset < max_seqlen_q)
    flat = padded.flatten(0, 1)
    return _take(flat, torch.where(inside, sequence * max_seqlen_q + offset, flat.shape[0]))


def _padded_slots(
    cu_seqlens: torch.Tensor, longest: int, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers (B, longest) of a packed tensor, `total` where padding; and which are real."""
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    rows = starts + torch.arange(longest, device=cu_seqlens.device)
    real = (rows < ends) & (rows < total)
    return torch.where(real, rows, total), real


def _take(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a packed tensor (N, ...) by number; number N gives zeros."""
    with_zero = torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])
    return with_zero.index_select(0, rows.reshape(-1)).view(*rows.shape, *packed.shape[1:])
