"""Attention with key padding in three forms: checks, choice of backend, rules."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from mpma_ext import reference
from mpma_ext.backends import choose, compiled_refusal, too_wide, triton_refusal
from mpma_ext.ops.checks import (
    check_cu_seqlens,
    check_dropout,
    check_floating,
    check_mask,
    check_shape,
)
from mpma_ext.ops.rules import (
    fake_gradients,
    needed,
    operator_for,
    register_rules,
    under_autocast,
)
from mpma_ext.reference.philox import seed_tensor
from mpma_ext.reference.precision import compute_dtype

# The widest heads that the CUDA kernels are written for.
CUDA_WIDEST = 128


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(scale · query keyᵀ) value over the keys that are to be attended to.

    Serves self-attention and cross-attention. With key_padding_mask = [[True, True, False]] every
    query of the one sample sees the first two of its three keys.

    Args:
        query: (B, Sq, H, D); float32, bfloat16, float16 or float64.
        key, value: (B, Sk, H, D); dtype and device of query.
        key_padding_mask: (B, Sk) bool, True = attend. What is masked may hold anything, NaN too.
        scale: D**-0.5 by default.
        dropout_p: share of the weights dropped after the softmax, in [0, 1).
        dropout_seed: an int, a one-element int64 tensor, or None to draw one from the default
            generator. The same seed drops the same weights on every backend.
        backend: None picks the fastest that can serve; see `mpma_ext.available_backends`.

    Returns:
        (B, Sq, H, D) in query's dtype, contiguous. A row with no key to attend to gives 0 and
        passes no gradient.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot serve.

    Vaswani et al., "Attention is all you need" (2017).
    """
    name = "masked_attention"
    query, key, value = under_autocast(name, query=query, key=key, value=value)
    check_floating(name, query=query, key=key, value=value)
    check_shape(name, "query", query, (None, None, None, None), "(B, Sq, H, D)")
    batch, _, heads, width = query.shape
    check_shape(name, "key", key, (batch, None, heads, width), "(B, Sk, H, D)")
    check_shape(name, "value", value, tuple(key.shape), "(B, Sk, H, D)")
    check_mask(name, "key_padding_mask", key_padding_mask, key, "(B, Sk)")
    check_dropout(name, dropout_p, dropout_seed, query)

    scale = width**-0.5 if scale is None else float(scale)
    chosen = _choose(name, backend, query, key_padding_mask, dropout_p)
    seed = seed_tensor(dropout_seed, query.device) if dropout_p > 0 else None
    if chosen == "reference":
        return reference.masked_attention(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            scale=scale,
            dropout_p=dropout_p,
            dropout_seed=seed,
        )
    if chosen == "torch":
        return _sdpa(query, key, value, key_padding_mask, scale)
    output, _ = operator_for(name, chosen)(
        query, key, value, key_padding_mask, scale, dropout_p, seed
    )
    return output


def masked_attention_qkvpacked(
    qkv: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`masked_attention` on one packed projection, read in place; its gradient is one tensor too.

    Args:
        qkv: (B, S, 3, H, D), query, key and value in this order.
        key_padding_mask: (B, S) bool, True = attend.
        scale, dropout_p, dropout_seed, backend: as in `masked_attention`.

    Returns:
        (B, S, H, D) in qkv's dtype, contiguous.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot serve.
    """
    name = "masked_attention_qkvpacked"
    (qkv,) = under_autocast(name, qkv=qkv)
    check_floating(name, qkv=qkv)
    check_shape(name, "qkv", qkv, (None, None, 3, None, None), "(B, S, 3, H, D)")
    check_mask(name, "key_padding_mask", key_padding_mask, qkv, "(B, S)")
    check_dropout(name, dropout_p, dropout_seed, qkv)

    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = _choose(name, backend, qkv, key_padding_mask, dropout_p)
    seed = seed_tensor(dropout_seed, qkv.device) if dropout_p > 0 else None
    if chosen == "reference":
        return reference.masked_attention_qkvpacked(
            qkv,
            key_padding_mask=key_padding_mask,
            scale=scale,
            dropout_p=dropout_p,
            dropout_seed=seed,
        )
    if chosen == "torch":
        return _sdpa(*qkv.unbind(2), key_padding_mask, scale)
    output, _ = operator_for(name, chosen)(qkv, key_padding_mask, scale, dropout_p, seed)
    return output


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
    backend: str | None = None,
) -> torch.Tensor:
    """`masked_attention` on packed sequences, so that padding is neither stored nor computed.

    Two sequences of 2 and 3 rows are packed as (5, H, D) with cu_seqlens = [0, 2, 5].

    Args:
        query: (Nq, H, D), the sequences one after the other; float32, bfloat16, float16, float64.
        key, value: (Nk, H, D); dtype and device of query.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where each sequence starts, from 0; sequences of
            length 0 are allowed. Their values are not validated, but never lead out of bounds.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        scale, dropout_p, dropout_seed, backend: as in `masked_attention`.

    Returns:
        (Nq, H, D) in query's dtype, contiguous; 0 in the rows after the last sequence.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot serve.
    """
    name = "masked_attention_varlen"
    query, key, value = under_autocast(name, query=query, key=key, value=value)
    check_floating(name, query=query, key=key, value=value)
    check_shape(name, "query", query, (None, None, None), "(Nq, H, D)")
    _, heads, width = query.shape
    check_shape(name, "key", key, (None, heads, width), "(Nk, H, D)")
    check_shape(name, "value", value, tuple(key.shape), "(Nk, H, D)")
    check_cu_seqlens(name, "cu_seqlens_q", cu_seqlens_q, query)
    check_cu_seqlens(name, "cu_seqlens_k", cu_seqlens_k, query)
    check_shape(name, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "(B + 1,)")
    for bound_name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(bound, (int, torch.SymInt)) or bound < 0:
            raise ValueError(f"{name}: {bound_name} must be an int >= 0, got {bound!r}")
    check_dropout(name, dropout_p, dropout_seed, query)

    scale = width**-0.5 if scale is None else float(scale)
    chosen = choose(
        name,
        backend,
        {
            "cuda": compiled_refusal("cuda", name, query) or too_wide(width, CUDA_WIDEST),
            "triton": triton_refusal(query) or too_wide(width, 128),
            "cpu": compiled_refusal("cpu", name, query),
            "torch": "scaled_dot_product_attention takes no packed sequences",
            "reference": None,
        },
    )
    seed = seed_tensor(dropout_seed, query.device) if dropout_p > 0 else None
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if chosen == "reference":
        return reference.masked_attention_varlen(
            query, key, value, *packing, scale=scale, dropout_p=dropout_p, dropout_seed=seed
        )
    output, _ = operator_for(name, chosen)(query, key, value, *packing, scale, dropout_p, seed)
    return output


def _choose(
    name: str,
    backend: str | None,
    query: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    dropout_p: float,
) -> str:
    refusals = {
        "cuda": compiled_refusal("cuda", name, query) or too_wide(query.shape[-1], CUDA_WIDEST),
        "triton": triton_refusal(query) or too_wide(query.shape[-1], 128),
        "cpu": compiled_refusal("cpu", name, query),
        "torch": "PyTorch's dropout does not draw the mask that dropout_seed stands for"
        if dropout_p > 0
        else None,
        "reference": None,
    }
    # PyTorch's kernel multiplies what is masked by zero, so a NaN there would spread.
    avoid = frozenset() if key_padding_mask is None else frozenset({"torch"})
    return choose(name, backend, refusals, avoid)


def _sdpa(query, key, value, key_padding_mask, scale):
    """PyTorch's fused attention on (B, S, H, D) operands."""
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return output.transpose(1, 2).contiguous()


def _padded_fake(query, key, value, key_padding_mask, scale, dropout_p, dropout_seed):
    batch, queries, heads, _ = query.shape
    statistics = query.new_empty((batch, heads, queries), dtype=compute_dtype(query))
    return query.new_empty(query.shape), statistics


def _qkvpacked_fake(qkv, key_padding_mask, scale, dropout_p, dropout_seed):
    batch, length, _, heads, width = qkv.shape
    statistics = qkv.new_empty((batch, heads, length), dtype=compute_dtype(qkv))
    return qkv.new_empty((batch, length, heads, width)), statistics


def _varlen_fake(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    dropout_p,
    dropout_seed,
):
    rows, heads, _ = query.shape
    statistics = query.new_empty((heads, rows), dtype=compute_dtype(query))
    return query.new_empty(query.shape), statistics


def _backward_fake(grad_output, query, key, value, *rest):
    return fake_gradients(*zip((query, key, value), rest[-3:], strict=True))


def _qkvpacked_backward_fake(grad_output, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _save(ctx, operands, extras, result, seed):
    output, logsumexp = result
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(*operands, output, logsumexp, *extras, seed)


def _padded_context(ctx, inputs, output):
    *operands, mask, ctx.scale, ctx.dropout_p, seed = inputs
    _save(ctx, operands, (mask,), output, seed)


def _varlen_context(ctx, inputs, output):
    query, key, value, cu_q, cu_k, *ctx.longest, ctx.scale, ctx.dropout_p, seed = inputs
    _save(ctx, (query, key, value), (cu_q, cu_k), output, seed)


def _padded_backward(operator, ctx, grad_output, _):
    *saved, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = operator(grad_output, *saved, ctx.scale, ctx.dropout_p, seed, *wanted)
    return (*map(needed, gradients, wanted), None, None, None, None)


def _qkvpacked_backward(operator, ctx, grad_output, _):
    *saved, seed = ctx.saved_tensors
    gradient = operator(grad_output, *saved, ctx.scale, ctx.dropout_p, seed)
    return gradient, None, None, None, None


def _varlen_backward(operator, ctx, grad_output, _):
    *saved, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = operator(grad_output, *saved, *ctx.longest, ctx.scale, ctx.dropout_p, seed, *wanted)
    return (*map(needed, gradients, wanted), *[None] * 7)


register_rules(
    "masked_attention",
    fake=_padded_fake,
    fake_backward=_backward_fake,
    setup_context=_padded_context,
    backward=_padded_backward,
)
register_rules(
    "masked_attention_qkvpacked",
    fake=_qkvpacked_fake,
    fake_backward=_qkvpacked_backward_fake,
    setup_context=_padded_context,
    backward=_qkvpacked_backward,
)
register_rules(
    "masked_attention_varlen",
    fake=_varlen_fake,
    fake_backward=_backward_fake,
    setup_context=_varlen_context,
    backward=_varlen_backward,
)
