"""Similarity of every report with every image, by softmax and by maxima."""

from functools import partial

import mpma_ext
from benchmarks import flops
from benchmarks.baselines import BASELINES
from benchmarks.lengths import padding_mask
from benchmarks.problem import Problem, assert_same, random_operands
from benchmarks.shapes import TRAINING


def bench_token_patch_similarity(case, backend, device, contest):
    _measure(mpma_ext.token_patch_similarity, 1, case, backend, device, contest)


def bench_token_patch_max_similarity(case, backend, device, contest):
    _measure(mpma_ext.token_patch_max_similarity, 2, case, backend, device, contest)


def _measure(operator, outputs, case, backend, device, contest):
    shape, backward = case.shape, case.mode == TRAINING
    batch, width = shape.batch, shape.width
    operands, draw = random_operands(
        case.dtype,
        device,
        tokens=(batch, shape.tokens, width),
        patches=(batch, shape.patches, width),
    )
    for features in operands.values():  # ⟨w, v⟩ of unit variance, as the model's heads give it
        features.data.mul_(width**-0.25)
    mask, real = None, batch * shape.tokens
    if shape.padded:
        mask = padding_mask(batch, shape.tokens)
        mask, real = mask.to(device), int(mask.sum())
    gradients = tuple(draw(batch, batch) for _ in range(outputs))
    rest = (operands | {"token_mask": mask}, gradients, backward)
    ours = Problem(partial(operator, backend=backend), *rest)
    baseline = Problem(BASELINES[case.operator][case.baseline], *rest)
    assert_same(ours(), baseline.in_float32()(), case.dtype)
    if outputs == 1:
        work = flops.similarity(real, batch, shape.patches, width, backward=backward)
    else:
        work = flops.max_similarity(batch, real, batch, shape.patches, width, backward=backward)
    contest(ours, baseline, work)
