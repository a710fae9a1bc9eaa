"""Packed attention beside a baseline that takes packed rows too: both get the same operands."""

from functools import partial

import torch

import mpma_ext
from benchmarks import flops
from benchmarks.baselines import BASELINES
from benchmarks.lengths import report_lengths
from benchmarks.problem import Problem, assert_same, random_operands
from benchmarks.shapes import TRAINING


def bench_packed(case, backend, device, contest):
    """Self-attention of packed reports; a script as those of the suite."""
    shape, backward = case.shape, case.mode == TRAINING
    lengths = torch.tensor(report_lengths(shape.reports))
    size = (int(lengths.sum()), shape.heads, shape.width)
    operands, draw = random_operands(case.dtype, device, query=size, key=size, value=size)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    packing = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    packing |= {"max_seqlen_q": int(lengths.max()), "max_seqlen_k": int(lengths.max())}
    rest = (operands | packing, (draw(*size),), backward)
    attend = partial(mpma_ext.masked_attention_varlen, backend=backend)
    ours, baseline = Problem(attend, *rest), Problem(BASELINES[case.operator]["varlen"], *rest)
    assert_same(ours(), baseline.in_float32()(), case.dtype)
    pairs = int((lengths * lengths).sum())
    contest(ours, baseline, flops.attention(pairs, shape.heads, shape.width, backward=backward))
