"""Other projects' kernels of the maximal similarity, where they are installed; for GPUs only.

Each has one direction, so that both cost two calls. tokens (Bt, T, D) with token_mask (Bt, T), True
= real; patches (Bi, P, D), all of them real. Two (Bt, Bi) come back, in float32.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines.half_precision import in_bfloat16
from benchmarks.baselines.refusal import optional


@in_bfloat16
def late_interaction(
    tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """late-interaction-kernels: masks; its backward is chosen by shape."""
    # Else every call brings a norm to the CPU, to warn of it.
    os.environ.setdefault("LIK_SUPPRESS_NORM_WARN", "1")
    maxsim = optional("late_interaction_kernels").maxsim

    def summed(queries, documents, query_mask=None, document_mask=None):
        return maxsim(queries, documents, query_mask, document_mask, backward="auto")

    return _both_directions(summed, tokens, patches, token_mask, token_mask)


@in_bfloat16
def flash_maxsim(
    tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """flash-maxsim: lengths, so that real tokens must be the first of a report."""
    score = optional("flash_maxsim").flash_maxsim_batched_train

    def summed(queries, documents, query_lengths=None, document_lengths=None):
        return score(queries, documents, doc_lengths=document_lengths, query_lengths=query_lengths)

    lengths = None if token_mask is None else token_mask.sum(1, dtype=torch.int32)
    return _both_directions(summed, tokens, patches, token_mask, lengths)


def _both_directions(
    summed: Callable[..., Tensor],
    tokens: Tensor,
    patches: Tensor,
    token_mask: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Means of `summed`, which gives a sum over the first operand's rows of their maxima.

    Args:
        real: which tokens are, as `summed` wants to be told.
    """
    count = tokens.shape[1] if token_mask is None else token_mask.sum(1, keepdim=True)
    to_patches = summed(tokens, patches, real) / count
    to_tokens = summed(patches, tokens, None, real).T / patches.shape[1]
    return to_patches, to_tokens
