"""The tests of traps in tests/ext, run with the CUDA kernels on the emulated machine."""

import os
import subprocess
import sys

import pytest
from emulation import ROOT, can_emulate


def check_traps(file: str, *options: str, glue: bool = False) -> None:
    """Runs tests/ext/<file> with MPMA_TEST_BACKEND=emulated; options are pytest's, such as -k.

    With `glue`, through that of csrc/cuda: see emulated_ops.
    """
    if reason := can_emulate():
        pytest.skip(reason)
    environment = os.environ | {"MPMA_TEST_BACKEND": "emulated", "MPMA_TEST_DEVICE": "cpu"}
    environment["MPMA_EMULATED_GLUE"] = str(int(glue))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, ROOT / "tests" / "ext" / file],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
