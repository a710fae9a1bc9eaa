"""The steps of a run: which there are, how long each may take, and what became of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("correctness", "sanitizer", "repeatability", "timings")
# Shares of the time limit, roughly what a step takes; Triton compiles what it meets first.
WEIGHTS = {
    "correctness": {"cuda": 7, "triton": 9},
    "sanitizer": {"cuda": 6, "triton": 9},
    "repeatability": {"cuda": 2, "triton": 6},
}
TIMINGS = {
    "masked_attention": 16,
    "masked_attention_varlen": 2,
    "memory_attention": 4,
    "token_patch_similarity": 8,
    "token_patch_max_similarity": 9,
}
PASSED, FAILED, SKIPPED, OUT_OF_TIME = "passed", "failed", "skipped", "out of time"
SKIP = 77  # the exit status of a step that says why it could not be taken
LINES = 40  # that are kept of what a step prints
GRACE = 15  # seconds that an interrupted step has to write down what it knows


@dataclass(frozen=True)
class Step:
    """One process: `python -m benchmarks.gpu.<stage>` with some arguments.

    Attributes:
        name: a backend or, of the timings, an operator.
        weight: its share of the time, beside those of the others.
    """

    stage: str
    name: str
    weight: float
    arguments: tuple[str, ...]


@dataclass
class Outcome:
    """What became of a step, and what its process wrote down: a reason, and details.

    Attributes:
        output: the last lines that it printed, unless it passed.
    """

    status: str
    seconds: float
    reason: str = ""
    details: object = None
    output: list[str] = field(default_factory=list)


def steps(
    stages: Sequence[str], backends: Sequence[str], operators: Sequence[str], timings: Sequence[str]
) -> Iterator[Step]:
    """All steps in order; `timings` are further arguments of that stage."""
    for stage in (s for s in STAGES if s in stages):
        if stage == "timings":
            options = ("--backend", *backends, *timings)
            for name in (o for o in TIMINGS if o in operators):
                yield Step(stage, name, TIMINGS[name], ("--operator", name, *options))
        else:
            for name in backends:
                yield Step(stage, name, WEIGHTS[stage][name], ("--backend", name))


def run_all(every: Sequence[Step], limit: float, record) -> list[Outcome]:
    """Take one step after the other within `limit` seconds.

    What a step leaves of its share is for the later ones.

    Args:
        record: called with a step and its outcome as soon as there is one.
    """
    # In the background of a shell interrupts are ignored, and the steps would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end, outcomes = time.monotonic() + limit, []
    for number, step in enumerate(every):
        left = end - time.monotonic()
        share = left * step.weight / sum(later.weight for later in every[number:])
        print(f"\n== {step.stage}, {step.name}: at most {max(share, 0):.0f} s", flush=True)
        if share > 0:
            outcome = run(step, share)
        else:
            outcome = Outcome(OUT_OF_TIME, 0.0, "nothing was left of the time limit")
        reason = outcome.reason and f": {outcome.reason}"
        took = f"{step.stage}, {step.name}: {outcome.status} after {outcome.seconds:.0f} s"
        print(f"== {took}{reason}", flush=True)
        record(step, outcome)
        outcomes.append(outcome)
    return outcomes


def run(step: Step, seconds: float) -> Outcome:
    """Take a step; after `seconds` it is interrupted, and a little later killed with its kin."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        start = time.monotonic()
        process = subprocess.Popen(
            command(step, report),
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        printed: deque[str] = deque(maxlen=LINES)
        printing = threading.Thread(target=_pass_on, args=(process.stdout, printed), daemon=True)
        printing.start()
        try:
            code = process.wait(seconds)
            status = {0: PASSED, SKIP: SKIPPED}.get(code, FAILED)
            reason = f"exit status {code}" if status == FAILED else ""
        except subprocess.TimeoutExpired:
            status, reason = OUT_OF_TIME, f"stopped after {seconds:.0f} s"
            _interrupt(process)
        finally:
            _kill(process)
            printing.join(GRACE)  # what left its session may keep the pipe open
        outcome = Outcome(status, round(time.monotonic() - start, 1), reason)
        outcome.output = [] if status == PASSED else list(printed)
        if report.exists():
            written = json.loads(report.read_text())
            outcome.reason = ", ".join(filter(None, (written["reason"], reason)))
            outcome.details = written["details"]
    return outcome


def command(step: Step, report: Path) -> list[str]:
    """The command line of a step's process, which writes `report`."""
    module = f"benchmarks.gpu.{step.stage}"
    return [sys.executable, "-m", module, *step.arguments, "--report", str(report)]


def write_report(path: Path, details: object, reason: str = "") -> None:
    """What a step's process knows so far, in one piece or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"reason": reason, "details": details}))
    unfinished.replace(path)


def write_checks(folder: Path, machine: dict, step: Step, outcome: Outcome) -> None:
    """Put an outcome into checks/<stage>.json, beside those of the stage's other steps."""
    path = folder / "checks" / f"{step.stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text())["steps"] if path.exists() else {}
    found |= {step.name: asdict(outcome) | {"machine": machine}}
    path.write_text(json.dumps({"stage": step.stage, "steps": found}, indent=1) + "\n")


def _pass_on(stream: TextIO, printed: deque[str]) -> None:
    """Print what a process does while it does, and keep the end of it."""
    with stream:
        for line in stream:
            print(line, end="", flush=True)
            printed.append(line.rstrip())


def _interrupt(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass


def _kill(process: subprocess.Popen) -> None:
    """End the process and what it started, which share its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
