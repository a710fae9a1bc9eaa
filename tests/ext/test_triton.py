"""The Triton kernels, as far as they run without a GPU: in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from operator_calls import CALLS

SCRIPT = Path(__file__).with_name("interpreted_triton.py")


@pytest.mark.parametrize("name", CALLS)
def test_the_interpreted_kernels_agree_with_the_definition(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name} torch.float32 agrees" in done.stdout
