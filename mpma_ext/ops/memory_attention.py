"""Attention to a bank of memory slots shared by the batch: checks, choice of backend, rules."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from mpma_ext import reference
from mpma_ext.backends import choose, compiled_refusal, too_wide, triton_refusal
from mpma_ext.ops.checks import check_dropout, check_floating, check_shape
from mpma_ext.ops.rules import (
    fake_gradients,
    needed,
    operator_for,
    register_rules,
    under_autocast,
)
from mpma_ext.reference.philox import seed_tensor
from mpma_ext.reference.precision import compute_dtype


def memory_attention(
    query: torch.Tensor,
    memory_key: torch.Tensor,
    memory_value: torch.Tensor,
    *,
    topk: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Weighted sum of memory values over the `topk` slots whose keys score highest.

        scores = scale · ⟨query, memory_key⟩           over the N slots, for every row and head
        output = Σ softmax(the K largest scores) · their memory_values

    Args:
        query: (..., H, D); float32, bfloat16, float16 or float64.
        memory_key, memory_value: (N, H, D), one bank for every row; dtype and device of query.
        topk: K >= 1; None, or K >= N, keeps every slot. Equal scores go to the lower slot.
        scale: D**-0.5 by default.
        dropout_p: share of the weights dropped after the softmax, in [0, 1).
        dropout_seed: an int, a one-element int64 tensor, or None to draw one from the default
            generator. The same seed drops the same weights on every backend.
        backend: None picks the fastest that can serve; see `mpma_ext.available_backends`.

    Returns:
        query's shape and dtype, contiguous. Gradients flow through the kept slots only.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot serve.

    The memory of Chen et al., "Cross-modal memory networks for radiology report generation" (ACL
    2021), with its bank projected once a step instead of once a sample.
    """
    name = "memory_attention"
    query, memory_key, memory_value = under_autocast(
        name, query=query, memory_key=memory_key, memory_value=memory_value
    )
    check_floating(name, query=query, memory_key=memory_key, memory_value=memory_value)
    if query.dim() < 2:
        raise ValueError(f"{name}: query must have shape (..., H, D), got {tuple(query.shape)}")
    heads, width = query.shape[-2:]
    check_shape(name, "memory_key", memory_key, (None, heads, width), "(N, H, D)")
    check_shape(name, "memory_value", memory_value, tuple(memory_key.shape), "(N, H, D)")
    slots = memory_key.shape[0]
    if slots < 1:
        raise ValueError(f"{name}: memory_key must hold at least one slot, got {slots}")
    if topk is not None and (isinstance(topk, bool) or not isinstance(topk, int) or topk < 1):
        raise ValueError(f"{name}: topk must be an int >= 1 or None, got {topk!r}")
    check_dropout(name, dropout_p, dropout_seed, query)

    scale = width**-0.5 if scale is None else float(scale)
    dense = topk is None or topk >= slots
    chosen = choose(
        name,
        backend,
        {
            "cuda": compiled_refusal("cuda", name, query)
            or too_wide(width, 128)
            or _too_many(None if dense else topk),
            "triton": triton_refusal(query)
            or too_wide(width, 128)
            or _too_many(None if dense else topk),
            "cpu": compiled_refusal("cpu", name, query),
            "torch": _torch_refusal(dense, dropout_p),
            "reference": None,
        },
    )
    seed = seed_tensor(dropout_seed, query.device) if dropout_p > 0 else None
    if chosen == "reference":
        return reference.memory_attention(
            query,
            memory_key,
            memory_value,
            topk=topk,
            scale=scale,
            dropout_p=dropout_p,
            dropout_seed=seed,
        )
    rows = query.reshape(math.prod(query.shape[:-2]), heads, width)
    if chosen == "torch":
        # One attention problem with every row as a query, so that the bank is not expanded.
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (rows, memory_key, memory_value))
        output = scaled_dot_product_attention(q, k, v, scale=scale)
        return output.squeeze(0).transpose(0, 1).contiguous().view(query.shape)
    output, _, _ = operator_for(name, chosen)(
        rows, memory_key, memory_value, 0 if dense else topk, scale, dropout_p, seed
    )
    return output.view(query.shape)


def _too_many(topk: int | None) -> str | None:
    return None if topk is None or topk <= 64 else f"it serves topk up to 64, this is {topk}"


def _torch_refusal(dense: bool, dropout_p: float) -> str | None:
    if not dense:
        return "PyTorch has no fused attention over the topk best keys"
    if dropout_p > 0:
        return "PyTorch's dropout does not draw the mask that dropout_seed stands for"
    return None


def _fake(query, memory_key, memory_value, topk, scale, dropout_p, dropout_seed):
    rows, heads, _ = query.shape
    return (
        query.new_empty(query.shape),
        query.new_empty((rows, heads), dtype=compute_dtype(query)),
        query.new_empty((rows, heads, topk), dtype=torch.int32),
    )


def _fake_backward(grad_output, query, memory_key, memory_value, *rest):
    operands = (query, memory_key, memory_value)
    return fake_gradients(*zip(operands, rest[-3:], strict=True))


def _setup_context(ctx, inputs, output):
    query, memory_key, memory_value, _, ctx.scale, ctx.dropout_p, dropout_seed = inputs
    result, logsumexp, indices = output
    ctx.mark_non_differentiable(logsumexp, indices)
    ctx.save_for_backward(query, memory_key, memory_value, result, logsumexp, indices, dropout_seed)


def _backward(operator, ctx, grad_output, *_):
    *saved, dropout_seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = operator(grad_output, *saved, ctx.scale, ctx.dropout_p, dropout_seed, *wanted)
    return (*map(needed, gradients, wanted), None, None, None, None)


register_rules(
    "memory_attention",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
)
