"""`python -m benchmarks.report`: the README's tables, from benchmarks/results/*/*.json.

Without options it prints them; `--write` puts them between the markers of the README.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as RichTable

from benchmarks.goals import GOALS, Goal
from benchmarks.shapes import TRAINING

FOLDER = Path(__file__).parent
RESULTS, README = FOLDER / "results", FOLDER.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NOT_MEASURED = "not measured"
# The sets that repeat the goals' shapes, and their dtypes.
GOAL_SETS = {"quick": "float32", "bfloat16": "bfloat16"}
LEGEND = (
    "`field` is how the field's repositories write it, `eager…` the best eager PyTorch we can "
    "write, `sdpa…` PyTorch's fused attention ([benchmarks/baselines](benchmarks/baselines)). "
    "Medians of runs in turn, one process; only work that the result needs counts as GFLOP. `at "
    "GEMM rate` is the ratio if our products ran at that rate, those included that a backward "
    "repeats because no scores are kept, and nothing else took any time: the bound of this design."
)
RATIO = "ratio [p20, p80]"
LIMIT = "at GEMM rate"
WORK = "GFLOP/s (share of GEMM): ours · theirs"
MEMORY = "peak extra MB: ours · theirs"


@dataclass(frozen=True)
class Table:
    """A title, the head of the columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """One measured comparison, the set of cases it belongs to, and what it was measured on."""

    shape_set: str
    machine: dict
    values: dict

    def __getitem__(self, name: str):
        return self.values[name]


def read_results(folder: Path = RESULTS) -> list[Row]:
    """Every measured row, by device, operator and set."""
    return [
        Row(name, measured["machine"], values)
        for path in sorted(folder.glob("*/*.json"))
        for name, measured in json.loads(path.read_text())["sets"].items()
        for values in measured["rows"]
    ]


def markdown(rows: Sequence[Row]) -> str:
    """What stands between the markers: for each device its tables, or that nothing is measured."""
    blocks = []
    for device in sorted({row.machine["device"] for row in rows}):
        mine = [row for row in rows if row.machine["device"] == device]
        blocks.append(_machine(mine))
        for name in GOAL_SETS:
            of_set = [row for row in mine if row.shape_set == name]
            if of_set or name == "quick":
                blocks.append(_markdown_table(set_table(name, of_set)))
        steps = step_table(mine)
        blocks += [_markdown_table(steps)] if steps.rows else []
        blocks.append(slowest_against_eager(mine))
    if not blocks:
        blocks = [_markdown_table(set_table("quick", []))]
    return "\n\n".join([*blocks, LEGEND]) + "\n"


def tables_of(
    rows: Sequence[Row], shape_sets: Collection[str], operators: Collection[str]
) -> Iterator[Table]:
    """One table for each of `shape_sets`."""
    goals = [goal for goal in GOALS if goal.operator in operators]
    for name in shape_sets:
        mine = [row for row in rows if row["operator"] in operators and row.shape_set == name]
        yield set_table(name, mine, goals)


def set_table(name: str, rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> Table:
    """The rows of one set: as goals where it is about them, which are the CPU kernels'."""
    if name in GOAL_SETS and all(row["backend"] == "cpu" for row in rows):
        return goal_table(rows, GOAL_SETS[name], goals)
    return row_table(name, rows)


def goal_table(rows: Sequence[Row], dtype: str, goals: Sequence[Goal]) -> Table:
    """What was reached of each goal, against the fastest of its baselines; goals are float32's."""
    judged = dtype == "float32"
    columns = ("operator", "shape", "against", *(("goal", "reached") if judged else ()))
    lines = []
    for goal in goals:
        mine = [row for row in rows if _is_about(row, goal)]
        measured = {row["baseline"] for row in mine} >= set(goal.against)
        row = min(mine, key=lambda row: row["ratio"]) if measured else None
        names = [f"**{n}**" if row and n == row["baseline"] else n for n in goal.against]
        figures = _figures(row) if row else (NOT_MEASURED, "", "")
        least = "" if row is None else f"{_ratio_at_gemm_rate(row):.2f} ×"
        what = (f"`{goal.operator}`", str(goal.shape), " · ".join(names))
        judgement = _judgement(goal, row) if judged else ()
        lines.append((*what, *judgement, figures[0], least, *figures[1:]))
    title = f"{dtype}, {TRAINING}, ratio of times to the fastest baseline (bold)"
    return Table(title, (*columns, RATIO, LIMIT, WORK, MEMORY), lines)


def _judgement(goal: Goal, row: Row | None) -> tuple[str, str]:
    """What is to be reached, and whether it was."""
    if goal.at_least is None:
        return "—", ""
    verdict = "" if row is None else "yes" if row["ratio"] >= goal.at_least else "**no**"
    return f"≥ {goal.at_least:g} ×", verdict


def row_table(name: str, rows: Sequence[Row]) -> Table:
    """Every comparison of one set of cases."""
    about = ("operator", "shape", "dtype", "mode", "backend", "baseline")
    columns = (*about, RATIO, "ours ms", WORK, MEMORY)
    lines = []
    for row in rows:
        ratio, work, memory = _figures(row)
        what = [str(row[key]) for key in about]
        lines.append((*what, ratio, f"{row['ours_ms']:.4g}", work, memory))
    return Table(f"set {name}", columns, lines)


def step_table(rows: Sequence[Row]) -> Table:
    """The whole training step, in pairs of an image and a report a second."""
    lines = []
    for row in rows:
        if row["operator"] == "training_step" and row.shape_set == "model":
            pairs = row["sizes"]["batch"]
            rates = [f"{1e3 * pairs / row[name]:.3g}" for name in ("ours_ms", "baseline_ms")]
            ratio, _, memory = _figures(row)
            lines.append((str(row["shape"]), *rates, ratio, memory))
    columns = ("preset", "pairs/s", "pairs/s with `reference`", RATIO, MEMORY)
    return Table("training step, float32", columns, lines)


def slowest_against_eager(rows: Sequence[Row]) -> str:
    """On all that was measured: the lowest ratio to eager PyTorch, and where it is below 1."""
    eager = [row for row in rows if row["baseline"].startswith("eager")]
    if not eager:
        return f"Against eager on the whole grid: {NOT_MEASURED}."
    worst = min(eager, key=lambda row: row["ratio"])
    slower = sum(row["ratio"] < 1 for row in eager)
    sets = ", ".join(sorted({row.shape_set for row in eager}))
    where = f"{worst['operator']}, {worst['shape']}, {worst['dtype']}, {worst['mode']}"
    return (
        f"Against eager in {len(eager)} comparisons (sets {sets}): slower in {slower}; the lowest "
        f"ratio is {worst['ratio']:.2f} × ({where}, {worst['baseline']})."
    )


def rich_table(table: Table) -> RichTable:
    """For the terminal."""
    shown = RichTable(*table.columns, title=table.title)
    for row in table.rows:
        shown.add_row(*(cell.replace("**", "").replace("`", "") for cell in row))
    return shown


def between_markers(text: str) -> str:
    """What stands between the markers of the README.

    Raises:
        ValueError: a marker is missing.
    """
    _, begin, rest = text.partition(BEGIN + "\n")
    body, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold a line {BEGIN} and, after it, a line {END}")
    return body


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Render the README's benchmark tables."
    )
    parser.add_argument("--write", action="store_true", help="put them into the README")
    args = parser.parse_args(argv)
    tables = markdown(read_results())
    if not args.write:
        print(tables, end="")
        return 0
    text = README.read_text()
    old, new = (f"{BEGIN}\n{body}{END}" for body in (between_markers(text), tables))
    README.write_text(text.replace(old, new))
    return 0


def _is_about(row: Row, goal: Goal) -> bool:
    what = (row["operator"], row["shape"], row["mode"])
    same = what == (goal.operator, str(goal.shape), TRAINING)
    return same and row["baseline"] in goal.against


def _figures(row: Row) -> tuple[str, str, str]:
    """Ratio with its spread; work and memory of ours and of the baseline."""
    ratio = f"{row['ratio']:.2f} × [{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]"
    work, memory = [], []
    for name in ("ours", "baseline"):
        rate = row[f"{name}_gflops"]
        work.append("—" if rate is None else f"{rate:.0f} ({rate / _gemm(row):.0%})")
        peak = row[f"{name}_peak_bytes"]
        memory.append("—" if peak is None else f"{peak / 1e6:.0f}")
    return ratio, " · ".join(work), " · ".join(memory)


def _ratio_at_gemm_rate(row: Row) -> float:
    """The ratio if our call took its matrix products at the machine's GEMM rate, and no more."""
    return row["baseline_ms"] / (1e3 * row["ours_done_gflop"] / _gemm(row))


def _gemm(row: Row) -> float:
    """GFLOP/s that are to be had: the CPU kernels may multiply bfloat16 in float32, not reverse."""
    rates = row.machine["gemm_gflops"]
    own = rates[row["dtype"]]
    return max(own, rates["float32"]) if row["backend"] == "cpu" else own


def _machine(rows: Sequence[Row]) -> str:
    """One line on where, when and with what the rows were measured."""
    machines = [row.machine for row in rows]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(machine[name]) for machine in machines}))

    rates = []
    for dtype in machines[0]["gemm_gflops"]:
        found = [machine["gemm_gflops"][dtype] for machine in machines]
        span = f"{min(found):.0f}" + ("" if len(set(found)) == 1 else f" to {max(found):.0f}")
        rates.append(f"{span} GFLOP/s in {dtype}")
    return (
        f"**{all_of('device')}** ({all_of('cpu_capability')}), torch {all_of('torch')}, "
        f"{all_of('date')}, commit {all_of('commit')}. GEMM: {', '.join(rates)}."
    )


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"{table.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
