"""Which compiled kernels the tests of traps call, all with the signatures of torch.ops.mpma.

MPMA_TEST_BACKEND: cpu (when not set), triton or cuda. MPMA_TEST_DEVICE: cuda for the kernels' own
device; cpu (when not set) for Triton's interpreter, which wants TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

import mpma_ext  # noqa: F401  registers torch.ops.mpma

BACKEND = os.environ.get("MPMA_TEST_BACKEND", "cpu")
DEVICE = os.environ.get("MPMA_TEST_DEVICE", "cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
if BACKEND != "cpu":
    DTYPES.remove(torch.float64)
if BACKEND == "triton" and DEVICE == "cpu":
    DTYPES.remove(torch.bfloat16)  # the interpreter multiplies wrongly in it

# What the kernels for GPUs serve: head widths, and slots that are kept of a bank.
WIDEST_HEAD, MOST_KEPT = (10**6, 10**6) if BACKEND == "cpu" else (128, 64)

cpu_only = pytest.mark.skipif(BACKEND != "cpu", reason="of the compiled CPU kernels alone")


class Operators:
    """`torch.ops.mpma` of one backend: operands are taken to its device, results brought back."""

    def __getattr__(self, name):
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
    return argument.to(device) if isinstance(argument, torch.Tensor) else argument


OPS = Operators()
