"""Stage correctness: the tests of traps, on the GPU, against the definitions in float64."""

import argparse
import importlib.util
import os
import re
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
                text = problem.text or ""
                failed[name] = f"{error_of(problem)}\n...{text[-300:]}"[:700]
    return counts | {"failed": dict(list(failed.items())[:MOST_SHOWN])}


def error_of(problem: ElementTree.Element) -> str:
    """What went wrong in the end. Of a file that cannot be imported the message does not tell."""
    raised = re.findall(r"(?:^E .*\n?)+", problem.text or "", re.MULTILINE)
    if not raised:
        return problem.get("message")
    return raised[-1].splitlines()[0].removeprefix("E").strip()


def reason(found: dict) -> str:
    """How many tests failed, and what the first of them says."""
    counted = f"{found['failures'] + found['errors']} of {found['tests']} tests failed"
    errors = [text.splitlines()[0] for text in found["failed"].values()]
    return f"{counted}, the first with: {errors[0]}" if errors else counted


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
            write_report(arguments.report, found, reason(found))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
