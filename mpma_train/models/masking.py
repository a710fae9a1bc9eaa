"""Paired masking: patches of the image and whole words of its report, both from one seed a pair.

Word j % 4 of Philox counter (j // 4, stream, 0, 0) under the pair's 64-bit seed is the rank of
patch j (stream 0) or of word j (stream 1); the lowest ranks are masked. So the masks of a pair
depend on its seed alone: not on its place in the batch, on padding, on the worker or on the rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpma_ext.reference.philox import philox_4x32, seed_words

_PATCHES, _WORDS = 0, 1
# Rank (32 bits) and word number (20 bits) share one sortable int64; no text has a million words.
_WORD_BITS = 20
_NEVER = 2**62


@dataclass
class PairedMasks:
    """What is hidden of a batch of pairs.

    Attributes:
        visible_patches: (B, Pv) int64, ascending numbers of the patches the encoder sees.
        masked_patches: (B, P - Pv) int64, ascending.
        masked_tokens: (B, T) bool, True where a token becomes [MASK].
    """

    visible_patches: Tensor
    masked_patches: Tensor
    masked_tokens: Tensor


def draw_masks(
    word_ids: Tensor,
    num_patches: int,
    num_masked_patches: int,
    text_mask_ratio: float,
    mask_seed: Tensor | None = None,
) -> PairedMasks:
    """Masks for a batch of pairs.

    Args:
        word_ids: (B, T) int64, the number of the word a token belongs to, -1 for what is never
            masked. Tokens of one word share its fate.
        num_patches: P.
        num_masked_patches: how many of them the encoder does not see.
        text_mask_ratio: share of the words that is masked, rounded, and at least one word of a
            report that has any; 0 masks none.
        mask_seed: (B,) int64. Without it, seeds come from the default generator of the device.
    """
    batch, device = word_ids.shape[0], word_ids.device
    if mask_seed is None:
        mask_seed = torch.randint(2**63 - 1, (batch,), device=device)
    patches = torch.arange(num_patches, device=device).expand(batch, -1)
    patch_rank, word_rank = _ranks(mask_seed, patches, word_ids.clamp(min=0))

    order = patch_rank.argsort(dim=1, stable=True)
    masked, visible = order.split([num_masked_patches, num_patches - num_masked_patches], dim=1)
    return PairedMasks(
        visible_patches=visible.sort(dim=1).values,
        masked_patches=masked.sort(dim=1).values,
        masked_tokens=_masked_tokens(word_rank, word_ids, text_mask_ratio),
    )


def _ranks(mask_seed: Tensor, patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Random 32-bit ranks, shaped as `patches` (B, P) and `words` (B, T), in one Philox call."""
    number = torch.cat([patches, words], dim=1)
    stream = torch.cat([torch.full_like(patches, _PATCHES), torch.full_like(words, _WORDS)], dim=1)
    zero = torch.zeros((), dtype=torch.int64, device=number.device)
    low, high = seed_words(mask_seed.unsqueeze(1))
    drawn = torch.stack(philox_4x32((number // 4, stream, zero, zero), low, high), dim=-1)
    rank = drawn.gather(-1, (number % 4).unsqueeze(-1)).squeeze(-1)
    return rank[:, : patches.shape[1]], rank[:, patches.shape[1] :]


def _masked_tokens(word_rank: Tensor, word_ids: Tensor, ratio: float) -> Tensor:
    """Tokens of the words with the lowest ranks: (B, T) bool."""
    if ratio == 0 or word_ids.shape[1] == 0:
        return torch.zeros_like(word_ids, dtype=torch.bool)
    # Sorted by (rank, word), the tokens of a word lie together and each new value is a new word.
    key = torch.where(word_ids >= 0, (word_rank << _WORD_BITS) + word_ids, _NEVER)
    key, position = key.sort(dim=1)
    new_word = torch.ones_like(key, dtype=torch.bool)
    new_word[:, 1:] = key[:, 1:] != key[:, :-1]
    new_word &= key != _NEVER
    words = new_word.sum(dim=1, keepdim=True)
    chosen = (words * ratio).round().clamp(min=1)
    masked = (new_word.cumsum(dim=1) <= chosen) & (key != _NEVER)
    return torch.zeros_like(masked).scatter(1, position, masked)
