"""Stage timings: the cases of the set gpu, a shape's backends and baselines in turn.

What computes something else than the operator is not timed. What is not timed is kept with the
reason: a baseline that is not installed or refuses is a finding, everything else a failure.
"""

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.baselines.refusal import RefusalError
from benchmarks.bench_masked_attention import bench_masked_attention, bench_masked_attention_varlen
from benchmarks.bench_memory_attention import bench_memory_attention
from benchmarks.bench_token_patch_similarity import (
    bench_token_patch_max_similarity,
    bench_token_patch_similarity,
)
from benchmarks.flops import Work
from benchmarks.gpu.device import GpuClock, describe_gpu, rates
from benchmarks.gpu.packed import bench_packed
from benchmarks.gpu.steps import write_report
from benchmarks.machine import slug
from benchmarks.peak_memory import peak_extra_bytes
from benchmarks.sets import SETS
from benchmarks.shapes import Case

SCRIPTS = {
    "masked_attention": bench_masked_attention,
    "masked_attention_varlen": bench_masked_attention_varlen,
    "memory_attention": bench_memory_attention,
    "token_patch_similarity": bench_token_patch_similarity,
    "token_patch_max_similarity": bench_token_patch_max_similarity,
}
COMPILED = ("compiled", "flex")
# Their errors are their own; one of ours shows beside the others too.
OTHERS = (*COMPILED, "varlen", "late_interaction", "flash_maxsim")
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100


@dataclass
class Group:
    """Cases of one shape, dtype and mode, which are timed together.

    Attributes:
        ours, theirs: what is timed, by backend and by baseline.
        absent: what is not: names and a reason.
    """

    cases: list[Case]
    work: Work | None = None
    ours: dict[str, Callable] = field(default_factory=dict)
    theirs: dict[str, Callable] = field(default_factory=dict)
    absent: list[dict] = field(default_factory=list)

    def collect(self, backends: Sequence[str], device: str) -> None:
        """Find out which backends and baselines compute the same.

        A backend meets only baselines that none has agreed with, once it has agreed with one.
        """
        torch.compiler.reset()  # dynamo keeps a few graphs of a function only
        for backend in backends:
            for case in self.cases:
                if backend in self.ours and case.baseline in self.theirs:
                    continue
                if any(a["baseline"] == case.baseline and a["refused"] for a in self.absent):
                    continue
                try:
                    ours, theirs, self.work = checked(case, backend, device)
                except Exception as error:
                    self.absent.append(absence(case, backend, error))
                    if isinstance(error, torch.AcceleratorError):
                        raise  # nothing runs on this device any more
                    release(device)
                    continue
                self.ours.setdefault(backend, ours)
                self.theirs.setdefault(case.baseline, theirs)

    def rows(self, clock: Callable, seconds: float, device: str) -> Iterator[dict]:
        """Time everything in turn, several rounds; a row for every backend and baseline."""
        if not self.ours:
            return
        times = in_turn(clock, [*self.ours.values(), *self.theirs.values()], seconds)
        ours = dict(zip(self.ours, times, strict=False))
        theirs = dict(zip(self.theirs, times[len(ours) :], strict=True))
        peaks = {}
        for side in (self.ours, self.theirs):
            for name, function in side.items():
                peaks[name] = peak_extra_bytes(function, device)
        for case in (c for c in self.cases if c.baseline in theirs):
            for backend in ours:
                row = labels(case) | {"backend": backend, "pairs": len(ours[backend])}
                row |= quantiles("ratio", theirs[case.baseline] / ours[backend])
                sides = (("ours", backend, ours), ("baseline", case.baseline, theirs))
                for side, name, of_side in sides:
                    seconds_each = of_side[name]
                    row |= quantiles(f"{side}_ms", 1e3 * seconds_each)
                    rate = self.work and 1e-9 * self.work.needed / float(np.median(seconds_each))
                    row[f"{side}_gflops"] = rate and short(rate)
                    row[f"{side}_peak_bytes"] = peaks[name]
                row["ours_done_gflop"] = self.work and short(1e-9 * self.work.done)
                yield row


def checked(case: Case, backend: str, device: str) -> tuple[Callable, Callable, Work | None]:
    """Ours and the baseline of a case, which compute the same, and the work that it is.

    Raises:
        RefusalError: the baseline is not installed or cannot serve.
        AssertionError: they do not compute the same.
    """
    found = []
    packed = case.operator == "masked_attention_varlen" and case.baseline == "varlen"
    script = bench_packed if packed else SCRIPTS[case.operator]
    script(case, backend, device, lambda *contest: found.append(contest))
    ours, theirs, *work = found[0]
    return ours, theirs, work[0] if work else None


def in_turn(clock: Callable, functions: Sequence[Callable], seconds: float) -> list[np.ndarray]:
    """Seconds of every function, one entry a round."""
    for function in functions:
        function()  # in its own dtype at last, for what is compiled or tuned then
    flushes = [clock.flushes(function) for function in functions]

    def once() -> list[float]:
        return [clock(f, n) for f, n in zip(functions, flushes, strict=True)]

    start = time.perf_counter()
    once()
    rounds = int(seconds / (time.perf_counter() - start))
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, rounds))
    return list(np.array([once() for _ in range(rounds)]).T)


def groups(operator: str) -> Iterator[Group]:
    """The operator's cases, what needs a compiler last."""
    for compiled in (False, True):
        found = defaultdict(list)
        for case in SETS["gpu"]():
            if case.operator == operator and (case.baseline in COMPILED) == compiled:
                found[case.shape, case.dtype, case.mode].append(case)
        yield from map(Group, found.values())


def absence(case: Case, backend: str, error: Exception) -> dict:
    """A comparison that is not measured, and why; `refused` where that is no failure."""
    differs = isinstance(error, AssertionError) and str(error).startswith("result ")
    refused = isinstance(error, (RefusalError, torch.OutOfMemoryError))
    refused |= case.baseline in OTHERS and not differs
    reason = f"{type(error).__name__}: {error}".strip()[:500]
    about = {"operator": case.operator, "shape": str(case.shape), "dtype": case.dtype}
    about |= {"mode": case.mode, "baseline": case.baseline, "backend": backend}
    return about | {"refused": refused, "reason": reason}


def labels(case: Case) -> dict[str, object]:
    """What a row is about, as in the other results."""
    return asdict(case) | {"shape": str(case.shape), "sizes": asdict(case.shape)}


def quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return {name: short(middle), f"{name}_p20": short(low), f"{name}_p80": short(high)}


def short(value: float) -> float:
    """Five digits, more than any timing has."""
    return float(f"{value:.5g}")


def write_results(folder: Path, operator: str, measured: dict) -> None:
    """Replace the set gpu in the operator's file, and keep its other sets."""
    path = folder / slug(measured["machine"]["device"]) / f"{operator}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text())["sets"] if path.exists() else {}
    written = {"operator": operator, "sets": kept | {"gpu": measured}}
    path.write_text(json.dumps(written, indent=1) + "\n")


def measure(
    operator: str, backends: Sequence[str], clock: Callable, machine: dict, arguments, device="cuda"
) -> dict:
    """Time all groups of an operator; the file is written anew after each of them."""
    measured = {"machine": machine, "rows": [], "absent": []}
    every = list(groups(operator))
    for number, group in enumerate(every, 1):
        try:
            group.collect(backends, device)
            measured["rows"] += group.rows(clock, arguments.seconds, device)
        finally:
            measured["absent"] += group.absent
            write_results(arguments.results, operator, measured)
            failed = [a for a in measured["absent"] if not a["refused"]]
            reasons = [f"{len(failed)} comparisons failed"] if failed else []
            reasons += [f"{number} of {len(every)} groups"] if number < len(every) else []
            write_report(arguments.report, measured["absent"], ", ".join(reasons))
        case = group.cases[0]
        print(f"{case.operator}, {case.shape}, {case.dtype}, {case.mode}", flush=True)
        for each in group.absent:
            print(f"  {each['backend']} and {each['baseline']}: {each['reason']}", flush=True)
        group.ours, group.theirs = {}, {}
        release(device)
    return measured


def release(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Time one operator: 0 where nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timings")
    parser.add_argument("--operator", required=True, choices=SCRIPTS)
    parser.add_argument("--backend", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on a shape")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    clock = GpuClock()
    machine = describe_gpu() | rates(clock)
    measured = measure(arguments.operator, arguments.backend, clock, machine, arguments)
    return int(any(not each["refused"] for each in measured["absent"]))


if __name__ == "__main__":
    sys.exit(main())
