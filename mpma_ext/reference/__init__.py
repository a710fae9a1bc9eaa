"""The definition of every operator in plain PyTorch.

These functions are written to be read and to be compared with: they keep float64, score in float32
or better, run on every device PyTorch runs on, and have derivatives of every order. They take the
arguments of their namesakes in `mpma_ext`, without `backend`.
"""

from mpma_ext.reference.masked_attention import (
    masked_attention,
    masked_attention_qkvpacked,
    masked_attention_varlen,
)
from mpma_ext.reference.memory_attention import memory_attention
from mpma_ext.reference.token_patch_similarity import (
    token_patch_max_similarity,
    token_patch_similarity,
)

__all__ = [
    "masked_attention",
    "masked_attention_qkvpacked",
    "masked_attention_varlen",
    "memory_attention",
    "token_patch_max_similarity",
    "token_patch_similarity",
]
