"""The operators of torch.ops.mpma, computed by the CUDA kernels on the emulated machine.

<family>.py defines functions of exactly the names and signatures of its operators and their
backwards, for CPU tensors. With MPMA_EMULATED_GLUE=1 the glue in csrc/cuda/<family>.cu takes their
place: what a GPU runs, but for the checks of global memory.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from emulation import HERE, EmulatedDevice, compile_emulated, compile_glue
from torch import Tensor

import mpma_ext  # noqa: F401  registers torch.ops.mpma, whose schemas the glue takes

FAMILIES = (
    "masked_attention",
    "memory_attention",
    "token_patch_similarity",
    "token_patch_max_similarity",
)


def operator(name: str) -> Callable:
    """The function that stands for torch.ops.mpma.<name>."""
    (family,) = (family for family in FAMILIES if name.startswith(family))
    if os.environ.get("MPMA_EMULATED_GLUE") == "1":
        return getattr(_glue(family), name)
    return getattr(import_module(f"emulated_ops.{family}"), name)


@cache
def _glue(family: str):
    """torch.ops.mpma_emulated with a family's operators."""
    library = torch.library.Library("mpma_emulated", "FRAGMENT")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"mpma::{family}") and "_triton" not in name:
            operator = getattr(torch.ops.mpma, name.partition("::")[2])
            library.define(str(operator.default._schema).removeprefix("mpma::"))
    ctypes.CDLL(str(compile_glue(family))).mpma_emulator_take_host_memory()
    _KEPT.append(library)
    return torch.ops.mpma_emulated


_KEPT = []  # a library that goes takes its operators with it


@cache
def device(stem: str) -> EmulatedDevice:
    """The machine with the launchers of tests/cuda/<stem>_emulated.cpp."""
    return EmulatedDevice(compile_emulated(HERE / f"{stem}_emulated.cpp"))


def suffix(tensor: Tensor) -> str:
    """What a launcher's name has after its underscore."""
    return str(tensor.dtype).removeprefix("torch.")


def readable(machine: EmulatedDevice, tensor: Tensor) -> Tensor:
    """In the machine's memory; copied first where the elements of a row are apart."""
    last = tensor.shape[-1]
    return machine.put(tensor if last < 2 or tensor.stride(-1) == 1 else tensor.contiguous())


def new_gradients(
    machine: EmulatedDevice, operands: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Memory for the gradients of operands, empty for those not needed."""
    pairs = zip(operands, needs, strict=True)
    return tuple(machine.empty(x.shape if need else (0,), x.dtype) for x, need in pairs)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The same for a launcher: None is not needed."""
    return [x if need else None for x, need in zip(gradients, needs, strict=True)]
