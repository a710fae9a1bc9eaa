"""Layers and conversions that transformers and PyTorch do not have."""

import torch
from torch import Tensor, nn


class GainLinear(nn.Linear):
    """A linear map that starts with weights of deviation gain / sqrt(in_features).

    Where nothing later normalises a scale, unit variance in is variance gain² out at any width; the
    0.02 of other layers would make memory and alignment respond a hundred times too weakly.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0):
        super().__init__(in_features, out_features)
        self.gain = gain


def full_precision(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if that is what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
