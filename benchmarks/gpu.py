"""Everything that needs a GPU, in one command: are the kernels right, then how fast they are.

`python -m benchmarks.gpu` runs the tests of traps on the GPU for every backend that serves it and,
where all pass, measures the set of shapes named gpu. Results go to benchmarks/results/<gpu>/: what
failed and how long each test took as <backend>-traps.xml, the timings as <operator>.json.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.__main__ import main as measure
from benchmarks.machine import slug
from mpma_ext.backends import available_backends

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("cuda", "triton")
TRAPS = [
    f"tests/ext/test_{family}_kernels.py"
    for family in (
        "masked_attention",
        "memory_attention",
        "token_patch_similarity",
    )
]


def traps(backend: str, report: Path) -> bool:
    """Whether a backend passes the tests of traps on the GPU; writes what they say."""
    environment = os.environ | {"MPMA_TEST_BACKEND": backend, "MPMA_TEST_DEVICE": "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TRAPS]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; not 0 where a test failed or a case could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", default="1", help="spent on the pairs of a case")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no usable GPU here")
    folder = arguments.results.resolve() / slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    serving = [name for name in BACKENDS if name in available_backends()]
    if not serving:
        parser.error(f"none of {', '.join(BACKENDS)} is in this installation")
    right = [traps(name, folder / f"{name}-traps.xml") for name in serving]
    if not all(right):
        print("not measured: a kernel that is wrong has no speed", file=sys.stderr)
        return 1
    options = ["--device", "cuda", "--shapes", "gpu", "--seconds", arguments.seconds]
    return measure([*options, "--results", str(arguments.results)])


if __name__ == "__main__":
    sys.exit(main())
