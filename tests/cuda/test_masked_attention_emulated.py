"""The CUDA kernels of masked attention in the tests of traps, and at their widest, emulated."""

import pytest
import torch
from emulated_traps import check_traps
from emulation import can_emulate

from mpma_ext.reference import masked_attention

# batch, queries, keys, heads, width: several tiles of queries and of keys, four parts of the width
WIDEST = (1, 40, 150, 2, 128)


def test_traps():
    check_traps("test_masked_attention_kernels.py")


def eager(query, key, value):
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def by_autograd(function, operands, grad, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in operands]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))


@pytest.mark.skipif(can_emulate() is not None, reason=can_emulate() or "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_widest_heads(dtype):
    """Errors at most twice eager's in that dtype, three times for gradients, and one rounding."""
    from emulated_ops.masked_attention import masked_attention as forward
    from emulated_ops.masked_attention import masked_attention_backward as backward

    batch, queries, keys, heads, width = WIDEST
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(batch, rows, heads, width, generator=generator).to(dtype)
        for rows in (queries, keys, keys, queries)
    )
    settings = (None, width**-0.5, 0.0, None)
    output, logsumexp = forward(query, key, value, *settings)
    needs = (True, True, True)
    got = output, *backward(grad, query, key, value, output, logsumexp, *settings, *needs)
    exact = by_autograd(masked_attention, (query, key, value), grad, torch.float64)
    rough = by_autograd(eager, (query, key, value), grad, dtype)
    for ours, truth, theirs, factor in zip(got, exact, rough, (2, 3, 3, 3), strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max()
        allowed = factor * (theirs.double() - truth).abs().max() + floor
        assert (ours.double() - truth).abs().max() <= allowed
