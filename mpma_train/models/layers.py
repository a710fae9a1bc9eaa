"""Layers and conversions that transformers and PyTorch do not have."""

import torch
from torch import Tensor, nn


class UnitGainLinear(nn.Linear):
    """A linear map that starts with weights of variance 1 / in_features.

    Where nothing later normalises a scale, unit variance in is unit variance out at any width; the
    0.02 of other layers would make memory and alignment respond a hundred times too weakly.
    """


def full_precision(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if that is what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
