"""Baselines whose kernels know half precision only."""

import functools
from collections.abc import Callable

import torch


def in_bfloat16(function: Callable) -> Callable:
    """`function`, which is given float32 operands as bfloat16.

    Results are checked with a baseline on the same values in float32. Those are values of bfloat16
    then, so that this changes none of them.
    """

    def narrow(operand):
        floating = isinstance(operand, torch.Tensor) and operand.dtype == torch.float32
        return operand.bfloat16() if floating else operand

    @functools.wraps(function)
    def wrapper(*operands, **named):
        return function(
            *map(narrow, operands), **{name: narrow(value) for name, value in named.items()}
        )

    return wrapper
