"""Stage sanitizer: compute-sanitizer's tools on small calls, with the caching allocator off.

With that allocator on, a stray access into memory that PyTorch holds would be none.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.steps import ROOT, SKIP, write_report

PROGRAM = "compute-sanitizer"
FOUND = 86  # the exit status where a tool found something
# PyTorch and Triton probe the driver with calls that may fail; bytes behind every allocation guard.
TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--padding", "64"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
# "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards"; without it a tool has checked nothing.
CLEAN = re.compile(r"SUMMARY: 0 (errors|hazards)")
MOST_SHOWN = 4000  # characters


def calls(backend: str) -> list[str]:
    """The program that is checked."""
    return [sys.executable, "-m", "benchmarks.gpu.calls", "--backend", backend]


def command(tool: str, backend: str) -> list[str]:
    """One tool on the calls of one backend."""
    options = ["--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    return [PROGRAM, "--tool", tool, *TOOLS[tool], *options, *calls(backend)]


def environment() -> dict[str, str]:
    """Every tensor is an allocation of its own."""
    return os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def verdict(code: int, output: str) -> dict:
    """What a tool's exit status and output mean; the reports, where it found something."""
    if code == 0 and CLEAN.search(output):
        return {"status": "passed"}
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    status = "failed" if code == FOUND else "not checked"
    shown = "\n".join(reports) if code == FOUND else output[-MOST_SHOWN:]
    return {"status": status, "exit_status": code, "output": shown[:MOST_SHOWN]}


def check(backend: str, report: Path) -> dict[str, dict]:
    """All tools at once; `report` is kept up to date."""
    found = {tool: {"status": "out of time"} for tool in TOOLS}
    write_report(report, found)
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for tool in TOOLS:
            output = (Path(folder) / tool).open("w+", errors="replace")
            running[tool] = (
                output,
                subprocess.Popen(
                    command(tool, backend),
                    cwd=ROOT,
                    env=environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                ),
            )
        for tool, (output, process) in running.items():
            code = process.wait()
            output.seek(0)
            found[tool] = verdict(code, output.read())
            print(f"{tool}: {found[tool]['status']}\n{found[tool].get('output', '')}", flush=True)
            write_report(report, found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Check one backend: 0 where every tool checked and found nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitizer")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if shutil.which(PROGRAM) is None:
        write_report(arguments.report, None, f"{PROGRAM} is not installed")
        return SKIP
    # Before the tools run side by side: Triton compiles, and what fails by itself is no finding.
    if subprocess.run(calls(arguments.backend), cwd=ROOT, env=environment()).returncode:
        write_report(arguments.report, None, "the calls fail by themselves")
        return 1
    found = check(arguments.backend, arguments.report)
    wrong = [f"{tool} {of['status']}" for tool, of in found.items() if of["status"] != "passed"]
    write_report(arguments.report, found, ", ".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
