"""Attention with key padding in plain PyTorch.

query (B, Sq, H, D), key and value (B, Sk, H, D), key_padding_mask (B, Sk) bool, True = attend; the
scale is D**-0.5. Contiguous (B, Sq, H, D) in query's dtype comes back.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.baselines.compiled import compiled
from benchmarks.baselines.half_precision import in_bfloat16
from benchmarks.baselines.refusal import RefusalError, optional


def field(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None
) -> Tensor:
    """As BERT and ViT implementations do: divided scores, an added mask, softmax, product."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    if key_padding_mask is not None:
        hidden = 1.0 - key_padding_mask[:, None, None, :].to(scores.dtype)
        scores = scores + hidden * torch.finfo(scores.dtype).min
    return torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous()


def eager(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None
) -> Tensor:
    """Scale and mask inside the first product, so that only the softmax walks over the scores."""
    batch, _, heads, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    bias = q.new_zeros(())
    if key_padding_mask is not None:
        bias = bias.expand(key_padding_mask.shape).masked_fill(~key_padding_mask, -torch.inf)
        bias = bias.repeat_interleave(heads, 0)[:, None, :]
    weights = torch.baddbmm(bias, q, k.mT, alpha=width**-0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None
) -> Tensor:
    """PyTorch's fused attention, whichever of its kernels it picks."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output.transpose(1, 2).contiguous()


def sdpa_loop(query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor) -> Tensor:
    """PyTorch's fused attention a sample at a time, without its padding; self-attention only."""
    lengths, longest = key_padding_mask.sum(1).tolist(), query.shape[1]
    outputs = []
    for *operands, length in zip(query, key, value, lengths, strict=True):
        q, k, v = (x[None, :length].transpose(1, 2) for x in operands)
        output = scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
        outputs.append(pad(output, (0, 0, 0, 0, 0, longest - length)))
    return torch.stack(outputs)


def by_kernel(kernel: SDPBackend) -> Callable[..., Tensor]:
    """`sdpa` by one of its kernels, which raises RefusalError where that one refuses."""

    @functools.wraps(sdpa)
    def attend(*operands, **named):
        with sdpa_kernel(kernel):
            try:
                return sdpa(*operands, **named)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise  # not a refusal
            except RuntimeError as error:
                raise RefusalError(f"{kernel.name}: {error}") from error

    return attend


def flex(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None
) -> Tensor:
    """PyTorch's FlexAttention, written to be compiled; the mask works on scores, not on blocks."""

    def hide(score, sample, head, query_index, key_index):
        return torch.where(key_padding_mask[sample, key_index], score, -torch.inf)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    output = flex_attention(q, k, v, score_mod=None if key_padding_mask is None else hide)
    return output.transpose(1, 2).contiguous()


def varlen(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None
) -> Tensor:
    """PyTorch's varlen_attn on sequences of one length, which are packed as they lie."""
    if key_padding_mask is not None:
        raise RefusalError("varlen_attn takes packed rows, not padded ones")
    batch, length, keys = *query.shape[:2], key.shape[1]
    starts = [
        torch.arange(batch + 1, device=query.device, dtype=torch.int32) * n for n in (length, keys)
    ]
    rows = (x.flatten(0, 1) for x in (query, key, value))
    return varlen_packed(*rows, *starts, length, keys).view(query.shape)


def varlen_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """PyTorch's varlen_attn on packed rows (N, H, D), which torch has from 2.10 on."""
    attend = optional("torch.nn.attention.varlen").varlen_attn
    return attend(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


BASELINES = {
    "field": field,
    "eager": eager,
    "compiled": compiled(eager),
    "sdpa": sdpa,
    "sdpa_flash": in_bfloat16(by_kernel(SDPBackend.FLASH_ATTENTION)),
    "sdpa_efficient": by_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_cudnn": in_bfloat16(by_kernel(SDPBackend.CUDNN_ATTENTION)),
    "sdpa_math": by_kernel(SDPBackend.MATH),
    "varlen": in_bfloat16(varlen),
    "flex": compiled(flex),
}
# `varlen` here takes packed rows, as the operator does; the others take them padded.
PACKED_BASELINES = BASELINES | {"sdpa_loop": sdpa_loop, "varlen": in_bfloat16(varlen_packed)}
