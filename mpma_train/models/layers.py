"""Layers that transformers does not have."""

from torch import nn


class UnitGainLinear(nn.Linear):
    """A linear map that starts with weights of variance 1 / in_features.

    Where nothing later normalises a scale, unit variance in is unit variance out at any width; the
    0.02 of other layers would make memory and alignment respond a hundred times too weakly.
    """
