"""Philox4x32-10 in kernels: the words of mpma_ext.reference.philox, bit for bit.

Four words come from one counter: draw them at a block of counters, and let each decide a weight.
"""

import triton
import triton.language as tl


@triton.jit
def seed_words(
    seed,  # (1) int64
):
    """The low and the high 32 bits of a seed: Philox's key."""
    whole = tl.load(seed).to(tl.uint64, bitcast=True)
    return (whole & 0xFFFFFFFF).to(tl.uint32), (whole >> 32).to(tl.uint32)


@triton.jit
def dropout_words(seed_lo, seed_hi, c0, c1, c2, c3):
    """The four uint32 words of each counter (c0, c1, c2, c3).

    Args:
        seed_lo, seed_hi: of `seed_words`.
        c0, c1, c2, c3: 32-bit integers, tensors of one shape or scalars.

    Returns:
        Four tensors of the broadcast shape.
    """
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, seed_lo, seed_hi)


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped iff its word is below this.

    Annotate the kernel's argument as tl.uint32, since the value may pass 2**31.
    """
    return int(dropout_p * 2**32)
