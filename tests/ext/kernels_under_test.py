"""Which compiled kernels the tests of traps call, all with the signatures of torch.ops.mpma.

MPMA_TEST_BACKEND: cpu (when not set), triton, cuda, or emulated for the CUDA kernels on the machine
that tests/cuda emulates. MPMA_TEST_DEVICE: cuda for the kernels' own device; cpu (when not set) for
the emulated machine, and for Triton's interpreter, which wants TRITON_INTERPRET=1.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import mpma_ext  # noqa: F401  registers torch.ops.mpma

BACKEND = os.environ.get("MPMA_TEST_BACKEND", "cpu")
DEVICE = os.environ.get("MPMA_TEST_DEVICE", "cpu")
# On another device the operators would be served by other kernels, and every test pass.
PLACES = (
    *(("cpu", "cpu"), ("emulated", "cpu"), ("triton", "cpu")),
    *(("triton", "cuda"), ("cuda", "cuda")),
)
if (BACKEND, DEVICE) not in PLACES:
    raise ValueError(f"MPMA_TEST_BACKEND={BACKEND} on MPMA_TEST_DEVICE={DEVICE}: not in {PLACES}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
if BACKEND != "cpu":
    DTYPES.remove(torch.float64)

if BACKEND == "emulated":
    sys.path.append(str(Path(__file__).resolve().parent.parent / "cuda"))
    import emulated_ops

# What the kernels for GPUs serve: head widths, and slots that are kept of a bank.
WIDEST_HEAD, MOST_KEPT = (10**6, 10**6) if BACKEND == "cpu" else (128, 64)

INTERPRETED = BACKEND == "triton" and DEVICE == "cpu"  # a thousand times slower: small shapes

cpu_only = pytest.mark.skipif(BACKEND != "cpu", reason="of the compiled CPU kernels alone")


class Operators:
    """`torch.ops.mpma` of one backend: operands are taken to its device, results brought back."""

    def __getattr__(self, name):
        if BACKEND == "emulated":
            return emulated_ops.operator(name)
        suffix = "_backward" if name.endswith("_backward") else ""
        twin = "_triton" if BACKEND == "triton" else ""
        operator = getattr(torch.ops.mpma, f"{name.removesuffix(suffix)}{twin}{suffix}")

        def call(*arguments):
            results = operator(*(moved(a, DEVICE) for a in arguments))
            if isinstance(results, torch.Tensor):
                return moved(results, "cpu")
            return tuple(moved(r, "cpu") for r in results)

        return call


def moved(argument, device):
    """A tensor on the device with the strides it has here, and what lies between its elements."""
    if not isinstance(argument, torch.Tensor) or argument.device.type == device:
        return argument
    if argument.is_contiguous():
        return argument.to(device)
    span = 1 + sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True))
    memory = argument.as_strided((span,), (1,)).to(device)
    return memory.as_strided(argument.shape, argument.stride())


OPS = Operators()
