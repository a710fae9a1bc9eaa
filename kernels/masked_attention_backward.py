"""The backward of masked attention in its three forms: launches of its kernels."""

import math

import torch
import triton

from mpma_ext.kernels.launch import launch
from mpma_ext.kernels.masked_attention_gradients import _backward, _backward_key
from mpma_ext.kernels.masked_attention_tiles import (
    STEM,
    block_d,
    bucket,
    in_place,
    precision,
    steps,
)
from mpma_ext.kernels.philox import dropout_threshold


def _write_gradients(
    grad_output: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None],
    longest: tuple[int, int],
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Fills the gradients of query, key and value, of any form; None is one not needed."""
    query, key, value = (in_place(x) for x in operands)
    grad_output, output = in_place(grad_output), in_place(output)
    logsumexp = logsumexp.contiguous()
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    grad_query, grad_key, grad_value = gradients
    key_steps = steps(grad_value if grad_key is None else grad_key)
    *_, query_rows, heads, width = query.shape
    packed = cu_seqlens[0] is not None
    items = cu_seqlens[0].shape[0] - 1 if packed else query.shape[0]
    programs = heads * (items + 2 * packed)
    if programs == 0 or gradients == (None, None, None):
        return
    shared = (*cu_seqlens, dropout_seed)
    sizes = (heads, items, *longest, query_rows, key.shape[-3])
    sizes += (scale, 1 / (1 - dropout_p), dropout_threshold(dropout_p))
    constants = {"WIDTH": width, "DROPOUT": dropout_p > 0, "BLOCK_D": block_d(width)}
    constants["PRECISION"] = precision()
    row = launch(STEM, "_backward", query, bucket(longest[0], width, dropout_p))
    elsewhere = longest[0] > row["BLOCK_M"] and (grad_key, grad_value) != (None, None)
    delta = torch.empty_like(logsumexp) if elsewhere else None
    _backward[max(triton.cdiv(longest[0], row["BLOCK_M"]), 1) * programs,](
        grad_output,
        query,
        key,
        value,
        output,
        logsumexp,
        mask,
        *shared,
        delta,
        grad_query,
        *((None, None) if elsewhere else (grad_key, grad_value)),
        steps(grad_output),
        steps(query),
        steps(key),
        steps(value),
        steps(output),
        steps(grad_query),
        key_steps,
        *sizes,
        **constants,
        **row,
    )
    if not elsewhere:
        return
    row = launch(STEM, "_backward_key", query, bucket(math.inf, width, dropout_p))
    _backward_key[max(triton.cdiv(longest[1], row["BLOCK_N"]), 1) * programs,](
        grad_output,
        query,
        key,
        value,
        logsumexp,
        mask,
        *shared,
        delta,
        grad_key,
        grad_value,
        steps(grad_output),
        steps(query),
        steps(key),
        steps(value),
        key_steps,
        *sizes,
        **constants,
        **row,
    )


def masked_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, empty where not needed."""
    operands = (query, key, value)
    gradients = _empty(operands, (need_query, need_key, need_value))
    longest = (query.shape[1], key.shape[1])
    saved = (output, logsumexp, key_padding_mask, (None, None), longest)
    _write_gradients(grad_output, operands, *saved, scale, dropout_p, dropout_seed, gradients)
    return _with_empty(gradients, operands)


def masked_attention_qkvpacked_backward(
    grad_output: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the packed projection (B, S, 3, H, D), its three parts written in place."""
    gradient = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    longest = (qkv.shape[1],) * 2
    saved = (output, logsumexp, key_padding_mask, (None, None), longest)
    _write_gradients(
        grad_output, qkv.unbind(2), *saved, scale, dropout_p, dropout_seed, gradient.unbind(2)
    )
    return gradient


def masked_attention_varlen_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, 0 in rows of no sequence, empty where not needed."""
    operands = (query, key, value)
    gradients = _empty(operands, (need_query, need_key, need_value))
    cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    longest = (min(max_seqlen_q, query.shape[0]), min(max_seqlen_k, key.shape[0]))
    saved = (output, logsumexp, None, cu_seqlens, longest)
    _write_gradients(grad_output, operands, *saved, scale, dropout_p, dropout_seed, gradients)
    return _with_empty(gradients, operands)


def _empty(operands, needs):
    """Room for the gradients that are needed, None for the others."""
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip(operands, needs, strict=True)
    )


def _with_empty(gradients, operands):
    """The gradients, an empty tensor for one not needed."""
    return tuple(
        operand.new_empty(0) if gradient is None else gradient
        for gradient, operand in zip(gradients, operands, strict=True)
    )
