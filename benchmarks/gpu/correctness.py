"""Stage correctness: the tests of traps, on the GPU, against the definitions in float64."""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.gpu.steps import ROOT, write_report

FAMILIES = ("masked_attention", "memory_attention", "token_patch_similarity")
TRAPS = [f"tests/ext/test_{family}_kernels.py" for family in FAMILIES]
MOST_WORKERS, MOST_SHOWN = 8, 40


def workers() -> list[str]:
    """Options that spread the tests over processes, where pytest-xdist is installed.

    Most of the time goes to definitions on the CPU and to compiling Triton's kernels.
    """
    count = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    if count < 2 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(count)]


def summary(junit: Path) -> dict:
    """Counts of a JUnit file, and which tests failed and how."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for problem in case.findall(kind):
                name = f"{case.get('classname')}::{case.get('name')}"
                # Its text ends with the error, which the message does not always name.
                failed[name] = f"{problem.get('message')}\n...{(problem.text or '')[-300:]}"[:700]
    return counts | {"failed": dict(list(failed.items())[:MOST_SHOWN])}


def main(argv: Sequence[str] | None = None) -> int:
    """Test one backend; pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.correctness")
    parser.add_argument("--backend", required=True, choices=("cuda", "triton"))
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    os.environ |= {"MPMA_TEST_BACKEND": arguments.backend, "MPMA_TEST_DEVICE": "cuda"}
    os.environ.setdefault("OMP_NUM_THREADS", "1" if workers() else "4")
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        status = pytest.main(["--rootdir", str(ROOT), *options, *workers(), *TRAPS])
        if junit.exists():
            found = summary(junit)
            wrong = found["failures"] + found["errors"]
            write_report(arguments.report, found, f"{wrong} of {found['tests']} tests failed")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
