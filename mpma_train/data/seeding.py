"""Seeds as a hash of what they belong to, so that no worker, rank or resume can change them."""

import hashlib

import numpy as np


def stateless_seed(seed: int, epoch: int, identifier: str, purpose: str) -> int:
    """64-bit seed of one sample in one epoch, for one purpose.

    Args:
        seed: the run's seed.
        epoch: number of the epoch, from 0.
        identifier: name of the sample; stays when its store is sorted or extended.
        purpose: what the seed is for, so that two uses of one sample are independent.

    Returns:
        An integer in [0, 2^64): the first eight bytes of BLAKE2b.
    """
    text = f"{purpose}\0{seed}\0{epoch}\0{identifier}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stateless_generator(
    seed: int, epoch: int, identifier: str, purpose: str
) -> np.random.Generator:
    """A numpy generator started from `stateless_seed`."""
    return np.random.Generator(
        np.random.Philox(key=stateless_seed(seed, epoch, identifier, purpose))
    )
