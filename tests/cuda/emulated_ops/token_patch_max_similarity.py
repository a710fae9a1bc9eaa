"""token_patch_max_similarity on the emulated machine.

As csrc/cuda/token_patch_max_similarity.cu does with PyTorch's tensors: what it copies or allocates
is copied or allocated here.
"""

import ctypes

import torch
from torch import Tensor

from emulated_ops import device, new_gradients, readable, suffix, wanted

ROWS_OF_A_TILE = 128  # tokens; longer reports want a workspace


def token_patch_max_similarity(
    tokens: Tensor, patches: Tensor, token_mask: Tensor | None, patch_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    machine = device("token_patch_max_similarity")
    pairs = (tokens.shape[0], patches.shape[0])
    means = [machine.empty(pairs, torch.float32) for _ in range(2)]
    indices = [machine.empty((*pairs, x.shape[1]), torch.int32) for x in (tokens, patches)]
    several = tokens.shape[1] > ROWS_OF_A_TILE
    machine.call(
        f"forward_{suffix(tokens)}",
        *side(tokens, token_mask),
        *side(patches, patch_mask),
        tokens.shape[2],
        *means,
        *indices,
        machine.empty(indices[1].shape, torch.float32) if several else None,
    )
    return *means, *indices


def token_patch_max_similarity_backward(
    grad_tokens_to_patches: Tensor,
    grad_patches_to_tokens: Tensor,
    tokens: Tensor,
    patches: Tensor,
    token_mask: Tensor | None,
    patch_mask: Tensor | None,
    patch_index: Tensor,
    token_index: Tensor,
    need_tokens: bool,
    need_patches: bool,
) -> tuple[Tensor, Tensor]:
    machine = device("token_patch_max_similarity")
    needs = (need_tokens, need_patches)
    grads = new_gradients(machine, (tokens, patches), needs)
    machine.library.backward_floats.restype = ctypes.c_int64
    floats = machine.library.backward_floats(*map(ctypes.c_int64, grad_tokens_to_patches.shape))
    read = (grad_tokens_to_patches, grad_patches_to_tokens, patch_index, token_index)
    machine.call(
        f"backward_{suffix(tokens)}",
        *side(tokens, token_mask),
        *side(patches, patch_mask),
        tokens.shape[2],
        *(machine.put(x.contiguous()) for x in read),
        machine.empty((floats,), torch.float32),
        *wanted(grads, needs),
    )
    return grads


def side(rows: Tensor, mask: Tensor | None) -> list:
    """What describes an operand: its rows and mask, sizes and strides."""
    machine = device("token_patch_max_similarity")
    items, length, _ = rows.shape
    rows, mask = readable(machine, rows), None if mask is None else machine.put(mask)
    strides = (0, 0) if mask is None else mask.stride()
    return [rows, mask, items, length, *rows.stride()[:2], *strides]
