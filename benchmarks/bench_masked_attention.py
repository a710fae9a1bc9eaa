"""Masked attention: padded, on one packed projection, and on packed sequences."""

from functools import partial

import torch

import mpma_ext
from benchmarks import flops
from benchmarks.baselines import BASELINES
from benchmarks.lengths import padding_mask, prefix_mask, report_lengths
from benchmarks.problem import Problem, assert_same, random_operands
from benchmarks.shapes import TRAINING


def bench_masked_attention(case, backend, device, contest):
    shape, backward = case.shape, case.mode == TRAINING
    size = (shape.batch, shape.length, shape.heads, shape.width)
    operands, draw = random_operands(case.dtype, device, query=size, key=size, value=size)
    mask, pairs = _padding(shape, device)
    rest = (operands | {"key_padding_mask": mask}, (draw(*size),), backward)
    ours = Problem(partial(mpma_ext.masked_attention, backend=backend), *rest)
    baseline = Problem(BASELINES[case.operator][case.baseline], *rest)
    assert_same(ours(), baseline.in_float32()(), case.dtype)
    contest(ours, baseline, flops.attention(pairs, shape.heads, shape.width, backward=backward))


def bench_masked_attention_qkvpacked(case, backend, device, contest):
    shape, backward = case.shape, case.mode == TRAINING
    size = (shape.batch, shape.length, 3, shape.heads, shape.width)
    operands, draw = random_operands(case.dtype, device, qkv=size)
    mask, pairs = _padding(shape, device)
    gradient = draw(shape.batch, shape.length, shape.heads, shape.width)
    rest = (operands | {"key_padding_mask": mask}, (gradient,), backward)
    attend = BASELINES[case.operator][case.baseline]

    def unpacked(qkv, key_padding_mask):
        return attend(*qkv.unbind(2), key_padding_mask=key_padding_mask)

    ours = Problem(partial(mpma_ext.masked_attention_qkvpacked, backend=backend), *rest)
    baseline = Problem(unpacked, *rest)
    assert_same(ours(), baseline.in_float32()(), case.dtype)
    contest(ours, baseline, flops.attention(pairs, shape.heads, shape.width, backward=backward))


def bench_masked_attention_varlen(case, backend, device, contest):
    """Ours on packed rows; the baseline on the same rows already padded, which costs it nothing."""
    shape, backward = case.shape, case.mode == TRAINING
    lengths = torch.tensor(report_lengths(shape.reports))
    key_lengths = lengths if shape.patches is None else torch.full_like(lengths, shape.patches)
    tail = (shape.heads, shape.width)
    rows, keys = int(lengths.sum()), int(key_lengths.sum())
    operands, draw = random_operands(
        case.dtype, device, query=(rows, *tail), key=(keys, *tail), value=(keys, *tail)
    )
    gradient = draw(rows, *tail)
    packing = {
        "cu_seqlens_q": _starts(lengths, device),
        "cu_seqlens_k": _starts(key_lengths, device),
        "max_seqlen_q": int(lengths.max()),
        "max_seqlen_k": int(key_lengths.max()),
    }
    attend = partial(mpma_ext.masked_attention_varlen, backend=backend)
    ours = Problem(attend, operands | packing, (gradient,), backward)

    query_mask = prefix_mask(lengths, packing["max_seqlen_q"]).to(device)
    key_mask = prefix_mask(key_lengths, packing["max_seqlen_k"]).to(device)
    masks = {"query": query_mask, "key": key_mask, "value": key_mask}
    padded = {
        name: _padded(operands[name].detach(), mask).requires_grad_()
        for name, mask in masks.items()
    }
    # Patches are never padded, and a mask of ones would only slow the baseline down.
    padded["key_padding_mask"] = key_mask if shape.patches is None else None
    attend = BASELINES[case.operator][case.baseline]
    baseline = Problem(attend, padded, (_padded(gradient, query_mask),), backward)

    results = zip(baseline.in_float32()(), (query_mask, *masks.values()), strict=False)
    assert_same(ours(), [result[mask] for result, mask in results], case.dtype)
    pairs = int((lengths * key_lengths).sum())
    contest(ours, baseline, flops.attention(pairs, shape.heads, shape.width, backward=backward))


def _padding(shape, device):
    """The mask of a batch, or None, and how many pairs of a query and a real key there are."""
    if not shape.padded:
        return None, shape.batch * shape.length**2
    mask = padding_mask(shape.batch, shape.length)
    return mask.to(device), shape.length * int(mask.sum())


def _starts(lengths, device):
    """Lengths (B,) as cu_seqlens, int32 (B + 1,)."""
    ends = lengths.cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32)


def _padded(packed, mask):
    """Rows (N, ...) in the places (B, S) where the mask is True; zeros elsewhere."""
    padded = packed.new_zeros((*mask.shape, *packed.shape[1:]))
    padded[mask] = packed
    return padded
