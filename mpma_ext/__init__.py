"""Fused operators for masked image-report pretraining.

`masked_attention`, `masked_attention_qkvpacked` and `masked_attention_varlen`; `memory_attention`;
`token_patch_similarity` and `token_patch_max_similarity`. `mpma_ext.reference` defines them in
plain PyTorch; `python -m mpma_ext` says what this installation can run.
"""

import importlib.util

import torch  # its libraries must be loaded before those that link to them

try:
    import mpma_ext._C  # registers torch.ops.mpma

    # There is one where CUDA was built; a PyTorch without CUDA could not load it.
    if torch.version.cuda and importlib.util.find_spec("mpma_ext._C_cuda"):
        import mpma_ext._C_cuda  # noqa: F401  registers the CUDA kernels
except ImportError as error:
    raise ImportError(
        "the compiled library mpma_ext._C cannot be loaded; run `make install` in the repository, "
        f"or `pip install --no-build-isolation .` beside torch 2.10 or newer ({error})"
    ) from error

from mpma_ext import reference
from mpma_ext.backends import available_backends, use_backend
from mpma_ext.ops import triton_kernels  # noqa: F401  behind torch.ops.mpma.*_triton
from mpma_ext.ops.masked_attention import (
    masked_attention,
    masked_attention_qkvpacked,
    masked_attention_varlen,
)
from mpma_ext.ops.memory_attention import memory_attention
from mpma_ext.ops.token_patch_similarity import (
    token_patch_max_similarity,
    token_patch_similarity,
)

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "masked_attention",
    "masked_attention_qkvpacked",
    "masked_attention_varlen",
    "memory_attention",
    "reference",
    "token_patch_max_similarity",
    "token_patch_similarity",
    "use_backend",
]
