"""What was measured on a GPU, as tables: goals and what was reached, times, and what is missing.

`python -m benchmarks.gpu.tables benchmarks/results/<gpu>` prints them in Markdown, on any machine.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.goals import (
    COPY_SHARE,
    DEVICE_GOALS,
    EXTRA_BYTES,
    GEMM_SHARE,
    RATIO,
    DeviceGoal,
    forward_bytes,
)
from benchmarks.gpu.steps import TIMINGS
from benchmarks.report import NOT_MEASURED, Table

BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Measured:
    """The set gpu of one operator."""

    machine: dict
    rows: list[dict]
    absent: list[dict]

    def of(self, shape: object, mode: str, backend: str) -> dict[str, dict]:
        """Rows by baseline."""
        return {
            row["baseline"]: row
            for row in self.rows
            if (row["shape"], row["mode"], row["backend"]) == (str(shape), mode, backend)
        }

    def refused(self, shape: object, mode: str) -> set[str]:
        """Baselines that cannot serve, so that nothing of them can be missing."""
        return {
            each["baseline"]
            for each in self.absent
            if (each["shape"], each["mode"]) == (str(shape), mode) and each["refused"]
        }


def read(folder: Path) -> dict[str, Measured]:
    """What a device's folder holds, by operator."""
    found = {}
    for operator in TIMINGS:
        path = folder / f"{operator}.json"
        sets = json.loads(path.read_text())["sets"] if path.exists() else {}
        if "gpu" in sets:
            found[operator] = Measured(**sets["gpu"])
    return found


def tables(measured: dict[str, Measured]) -> Iterator[Table]:
    """All of them; those of times and absences only where there are some."""
    yield goal_table(measured)
    yield from (t for t in (time_table(measured), absence_table(measured)) if t.rows)


def markdown(table: Table) -> str:
    """A table with its title."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"{table.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def goal_table(measured: dict[str, Measured], goals: Sequence[DeviceGoal] = DEVICE_GOALS) -> Table:
    """Every goal, and what each backend reached of it."""
    lines = []
    for goal in goals:
        reached = [
            judgement(goal, backend, measured.get(goal.operator))
            if backend in goal.backends
            else "—"
            for backend in BACKENDS
        ]
        against = f" as {' · '.join(goal.against)}" if goal.against else ""
        what = (f"`{goal.operator}`", str(goal.shape), goal.mode)
        lines.append((*what, f"{bound(goal)} {goal.measure}{against}", *reached))
    columns = ("operator", "shape", "mode", "goal", *BACKENDS)
    return Table("bfloat16: goals and what was reached", columns, lines)


def bound(goal: DeviceGoal) -> str:
    """The bound as text."""
    return f"{sign(goal)} {shown(goal, goal.bound)}"


def sign(goal: DeviceGoal) -> str:
    return "≤" if goal.measure == EXTRA_BYTES else "≥"


def shown(goal: DeviceGoal, value: float) -> str:
    """A value of a goal's measure as text."""
    if goal.measure == RATIO:
        return f"{value:.2f} ×"
    return f"{value / 1e6:.0f} MB" if goal.measure == EXTRA_BYTES else f"{value:.0%}"


def judgement(goal: DeviceGoal, backend: str, measured: Measured | None) -> str:
    """What a backend reached and whether that is enough, or that it is not measured."""
    value, beside = (None, "") if measured is None else reach(goal, backend, measured)
    if value is None:
        return f"{NOT_MEASURED}{beside}"
    enough = value <= goal.bound if goal.measure == EXTRA_BYTES else value >= goal.bound
    return f"{shown(goal, value)}{beside}: {'yes' if enough else '**no**'}"


def reach(goal: DeviceGoal, backend: str, measured: Measured) -> tuple[float | None, str]:
    """The measure's value, or None, and what is to be said beside it."""
    rows = measured.of(goal.shape, goal.mode, backend)
    if not rows:
        return None, ""
    if goal.measure == RATIO:
        if goal.against == ("triton",):
            return over_triton(goal, rows, measured), ""
        return over_fastest(goal, rows, measured.refused(goal.shape, goal.mode))
    if goal.measure == EXTRA_BYTES:
        return max(row["ours_peak_bytes"] for row in rows.values()), ""
    milliseconds = median(row["ours_ms"] for row in rows.values())
    if goal.measure == COPY_SHARE:
        rate = 1e-6 * forward_bytes(goal.shape) / milliseconds
        return rate / measured.machine["copy_gb_per_second"], ""
    assert goal.measure == GEMM_SHARE
    rate = median(row["ours_gflops"] for row in rows.values())
    return rate / measured.machine["gemm_gflops"]["bfloat16"], ""


def over_fastest(goal: DeviceGoal, rows: dict, refused: set[str]) -> tuple[float | None, str]:
    """The ratio to the fastest baseline; None where one might be faster that is not measured."""
    missing = [name for name in goal.against if name not in rows and name not in refused]
    ratios = {name: rows[name]["ratio"] for name in goal.against if name in rows}
    if missing or not ratios:
        return None, f" ({', '.join(missing or goal.against)})"
    fastest = min(ratios, key=ratios.get)
    return ratios[fastest], f" {fastest}"


def over_triton(goal: DeviceGoal, rows: dict, measured: Measured) -> float | None:
    """How many times as long as this backend Triton takes, timed beside the same baseline."""
    theirs = measured.of(goal.shape, goal.mode, "triton")
    ratios = [theirs[name]["ours_ms"] / rows[name]["ours_ms"] for name in rows if name in theirs]
    return median(ratios) if ratios else None


def time_table(measured: dict[str, Measured]) -> Table:
    """Milliseconds and extra memory of ours and of every baseline, a line a shape and mode."""
    lines = []
    for operator, of_operator in measured.items():
        places = dict.fromkeys((row["shape"], row["mode"]) for row in of_operator.rows)
        for shape, mode in places:
            ours = {name: of_operator.of(shape, mode, name) for name in BACKENDS}
            cells = [
                cost("ours", next(iter(rows.values()))) if rows else NOT_MEASURED
                for rows in ours.values()
            ]
            theirs = {name: row for rows in ours.values() for name, row in rows.items()}
            beside = " · ".join(f"{name} {cost('baseline', row)}" for name, row in theirs.items())
            lines.append((f"`{operator}`", shape, mode, *cells, beside))
    columns = ("operator", "shape", "mode", *BACKENDS, "baselines")
    return Table("bfloat16: milliseconds (peak extra MB)", columns, lines)


def cost(side: str, row: dict) -> str:
    """Time and memory of ours or of the baseline."""
    return f"{row[f'{side}_ms']:.3g} ({row[f'{side}_peak_bytes'] / 1e6:.0f})"


def absence_table(measured: dict[str, Measured]) -> Table:
    """What could not be measured, and why."""
    about = ("shape", "mode", "backend", "baseline")
    lines = []
    for of_operator in measured.values():
        for each in of_operator.absent:
            reason = each["reason"].splitlines()[0][:120]
            lines.append((f"`{each['operator']}`", *(each[key] for key in about), reason))
    columns = ("operator", "shape", "mode", "backend", "baseline", "reason")
    return Table("bfloat16: not measured", columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of a device's folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tables")
    parser.add_argument("folder", type=Path)
    measured = read(parser.parse_args(argv).folder)
    print("\n\n".join(map(markdown, tables(measured))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
