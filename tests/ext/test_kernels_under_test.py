"""The tests of traps call the kernels that they say they call, on the operands they were given."""

import os
import subprocess
import sys

import pytest
import torch
from kernels_under_test import moved


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, 5),
        torch.randn(3, 4, 5).transpose(0, 2),
        torch.randn(3, 8, 5)[1:, ::2],
        torch.randn(3, 1, 5).expand(3, 4, 5),
        torch.randn(0, 4).T,
    ],
    ids=["contiguous", "transposed", "sliced", "expanded", "empty"],
)
def test_operands_keep_their_strides(tensor):
    there = moved(tensor, "meta")
    assert there.device.type == "meta"
    assert there.shape == tensor.shape and there.stride() == tensor.stride()


@pytest.mark.parametrize(("backend", "device"), [("cuda", "cpu"), ("emulated", "cuda")])
def test_kernels_that_would_not_run_are_refused(backend, device):
    environment = os.environ | {"MPMA_TEST_BACKEND": backend, "MPMA_TEST_DEVICE": device}
    command = [sys.executable, "-c", "import kernels_under_test"]
    folder = os.path.dirname(__file__)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert f"MPMA_TEST_BACKEND={backend}" in done.stderr and done.returncode != 0
