"""The operators of torch.ops.mpma, computed by the CUDA kernels on the emulated machine.

<family>.py defines functions of exactly the names and signatures of its operators and their
backwards, for CPU tensors.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

from emulation import HERE, EmulatedDevice, compile_emulated

FAMILIES = (
    "masked_attention",
    "memory_attention",
    "token_patch_similarity",
    "token_patch_max_similarity",
)


def operator(name: str) -> Callable:
    """The function that stands for torch.ops.mpma.<name>."""
    (family,) = (family for family in FAMILIES if name.startswith(family))
    return getattr(import_module(f"emulated_ops.{family}"), name)


@cache
def device(stem: str) -> EmulatedDevice:
    """The machine with the launchers of tests/cuda/<stem>_emulated.cpp."""
    return EmulatedDevice(compile_emulated(HERE / f"{stem}_emulated.cpp"))
