"""The Triton kernels, as far as a machine without a GPU goes: interpreted, and compiled."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from operator_calls import CALLS

pytest.importorskip("triton", reason="Triton is for Linux")
from mpma_ext.kernels.compile import compile_case

SCRIPT = Path(__file__).with_name("interpreted_triton.py")


@pytest.mark.parametrize("name", CALLS)
def test_the_interpreted_kernels_agree_with_the_definition(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name} torch.float32 agrees" in done.stdout


@pytest.mark.parametrize(
    "kernels", ["masked_attention", "memory_attention", "token_patch_max_similarity"]
)
def test_a_forward_kernel_compiles_for_a_gpu_that_is_not_here(kernels):
    module = importlib.import_module(f"mpma_ext.kernels.{kernels}")
    on_hopper = (case for case in module.compile_cases() if case.generation == "sm90")
    case = next(case for case in on_hopper if "bfloat16" in case.name and case.uses_dot)
    row = compile_case(case)
    assert row["spills"] == 0 and row["fits"] and "wgmma" in row["tensor_cores"]
    assert 0 < row["registers"] <= 255 and row["hash"] == case.digest()
