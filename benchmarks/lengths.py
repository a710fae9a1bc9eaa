"""Lengths of reports and of padded sequences, the same on every run."""

import math

import torch
from torch import Tensor


def report_lengths(count: int) -> list[int]:
    """Tokens of `count` reports, distributed as in Open-I (Indiana University) chest radiographs.

    A log-normal with median 41 and 95th percentile 91, clipped to 1..256, fits the 3,955 public
    reports' findings and impressions.
    """
    sigma = math.log(91 / 41) / 1.645  # the normal distribution's own 95th percentile
    logarithms = math.log(41) + sigma * torch.randn(count, generator=_generator())
    return logarithms.exp().round().clamp(1, 256).int().tolist()


def padding_mask(batch: int, length: int) -> Tensor:
    """(batch, length) bool, True = real; lengths uniform in [length / 2, length]."""
    shortest = math.ceil(length / 2)
    return prefix_mask(
        torch.randint(shortest, length + 1, (batch,), generator=_generator()), length
    )


def prefix_mask(lengths: Tensor, length: int) -> Tensor:
    """(B,) lengths to (B, length) bool, True for so many first entries of each row."""
    return torch.arange(length) < lengths[:, None]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
