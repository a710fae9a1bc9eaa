"""Attention to a bank of memory slots, over the topk best and over all."""

from functools import partial

import mpma_ext
from benchmarks import flops
from benchmarks.baselines import BASELINES
from benchmarks.problem import Problem, assert_same, random_operands
from benchmarks.shapes import TRAINING


def bench_memory_attention(case, backend, device, contest):
    shape, backward = case.shape, case.mode == TRAINING
    size = (shape.batch, shape.length, shape.heads, shape.width)
    bank = (shape.slots, shape.heads, shape.width)
    operands, draw = random_operands(
        case.dtype, device, query=size, memory_key=bank, memory_value=bank
    )
    rest = (operands | {"topk": shape.topk}, (draw(*size),), backward)
    ours = Problem(partial(mpma_ext.memory_attention, backend=backend), *rest)
    baseline = Problem(BASELINES[case.operator][case.baseline], *rest)
    assert_same(ours(), baseline.in_float32()(), case.dtype)
    rows = shape.batch * shape.length
    work = flops.memory(rows, shape.heads, shape.width, shape.slots, shape.topk, backward=backward)
    contest(ours, baseline, work)
