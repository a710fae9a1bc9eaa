"""Philox4x32-10 in integer tensor arithmetic, and the dropout masks every backend draws from it.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter of
four 32-bit words and a key of two give four 32-bit words; nothing is stored and nothing depends on
the order of evaluation, so the same seed drops the same elements on every backend.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox_4x32(counter: Words, key_low: torch.Tensor | int, key_high: torch.Tensor | int) -> Words:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32).
        key_low, key_high: int64 tensors that broadcast with them, or ints, in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    device = counter[0].device
    keys = (torch.as_tensor(key, device=device) for key in (key_low, key_high))
    words = torch.ops.mpma.philox_4x32(*torch.broadcast_tensors(*counter, *keys))
    return words.unbind(-1)


# An operator of its own, so that a compiler leaves it alone: Inductor inlines the ten rounds into
# every use, and takes the wrap-around of a signed product for impossible.
torch.library.define(
    "mpma::philox_4x32",
    "(Tensor c0, Tensor c1, Tensor c2, Tensor c3, Tensor key_low, Tensor key_high) -> Tensor",
)


@torch.library.impl("mpma::philox_4x32", "CompositeExplicitAutograd")
def _words(c0, c1, c2, c3, key_low, key_high):
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which leaves the bits of the unsigned product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ key_low,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ key_high,
            first & _MASK,
        )
        key_low, key_high = (key_low + _WEYL[0]) & _MASK, (key_high + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


@torch.library.register_fake("mpma::philox_4x32")
def _(c0, c1, c2, c3, key_low, key_high):
    return c0.new_empty((*c0.shape, 4))


def seed_tensor(seed: torch.Tensor | int | None, device: torch.device) -> torch.Tensor:
    """The seed as a one-element int64 tensor; None draws it from the device's default generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        return seed.reshape(1)
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def seed_words(seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high 32 bits of an int64 tensor: Philox's key."""
    return seed & _MASK, (seed >> 32) & _MASK


def _kept(word: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return word >= int(dropout_p * 2**32)


def attention_dropout_keep(
    seed: torch.Tensor, dropout_p: float, batch: int, heads: int, queries: int, keys: int
) -> torch.Tensor:
    """Which attention weights stay: bool (batch, heads, queries, keys).

    Word j % 4 of counter (j // 4, i, h, b) decides the weight of query i on key j.
    """

    def axis(length: int, position: int) -> torch.Tensor:
        shape = [1, 1, 1, 1]
        shape[position] = length
        return torch.arange(length, device=seed.device).view(shape)

    quads = (keys + 3) // 4
    counter = (axis(quads, 3), axis(queries, 2), axis(heads, 1), axis(batch, 0))
    words = torch.stack(philox_4x32(counter, *seed_words(seed)), dim=-1)
    return _kept(words.flatten(-2)[..., :keys], dropout_p)


def memory_dropout_keep(seed: torch.Tensor, dropout_p: float, slots: torch.Tensor) -> torch.Tensor:
    """Which memory weights stay: bool, the shape of `slots` (R, H, K), int64 slot numbers.

    Word n % 4 of counter (n // 4, h, row low, row high) decides the weight of a row on slot n.
    """
    rows, heads, _ = slots.shape
    row = torch.arange(rows, device=slots.device).view(-1, 1, 1)
    head = torch.arange(heads, device=slots.device).view(1, -1, 1)
    words = philox_4x32((slots // 4, head, row & _MASK, row >> 32), *seed_words(seed))
    word = torch.stack(words, dim=-1).gather(-1, (slots % 4).unsqueeze(-1)).squeeze(-1)
    return _kept(word, dropout_p)


def dropped(weights: torch.Tensor, keep: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Weights after dropout: 0 where not kept, scaled by 1 / (1 - p) where kept."""
    return weights.masked_fill(~keep, 0) / (1 - dropout_p)
