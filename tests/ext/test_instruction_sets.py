"""The compiled CPU kernels under instruction sets below this processor's.

No machine runs them by itself, and what it does run are other functions of the same sources.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels_under_test import cpu_only

HERE = Path(__file__).parent
# Where vectors and their products matter; float64 is always computed in portable vectors, float16
# as float32.
VECTORS = "(eager or extreme or dropout or threads) and not float64 and not float16"
PRODUCTS_OF_BFLOAT16 = "threads or (eager and bfloat16)"


@pytest.mark.parametrize(
    ("variable", "limit", "chosen"),
    [
        ("ATEN_CPU_CAPABILITY", "default", VECTORS),
        ("ATEN_CPU_CAPABILITY", "avx2", VECTORS),
        ("ATEN_CPU_CAPABILITY", "avx512", PRODUCTS_OF_BFLOAT16),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16", PRODUCTS_OF_BFLOAT16),
    ],
)
@cpu_only
def test_traps(variable, limit, chosen):
    files = sorted(HERE.glob("test_*_kernels.py"))
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-qxp", "no:cacheprovider", *files, "-k", chosen],
        env=os.environ | {variable: limit, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-3000:]
