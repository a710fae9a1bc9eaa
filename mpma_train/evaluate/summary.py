"""One table of all the results of a run: `python -m mpma_train.evaluate.summary RUN_DIR`."""

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mpma_train.evaluate.results import Result, format_interval, format_number


def load_results(run: str | Path) -> list[Result]:
    """Every result under `run/eval`, by task name.

    Raises:
        ValueError: there is none.
    """
    results = [Result.load(path) for path in sorted(Path(run, "eval").glob("*.json"))]
    if not results:
        raise ValueError(f"{run}: expected results in its folder eval, found none")
    return results


def summary_table(run: str | Path, results: list[Result]) -> Table:
    """A section a task; per-label values and deviations are left to the tasks' own tables."""
    table = Table(title=f"held-out results of {run}", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    table.add_column("model", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    table.add_column("baselines")
    for result in results:
        table.add_row(f"{result.task} (n {result.n})", style="bold")
        for name, value in result.metrics.items():
            if "/" in name or name.endswith("_std"):
                continue
            others = [
                f"{baseline} {format_number(numbers[name])}"
                for baseline, numbers in result.baselines.items()
                if name in numbers
            ]
            interval = format_interval(result.intervals.get(name))
            table.add_row(f"  {name}", format_number(value), interval, " · ".join(others))
        table.add_section()
    return table


def main(argv: list[str] | None = None) -> int:
    """Print the table of the run named on the command line."""
    parser = argparse.ArgumentParser(prog="mpma_train.evaluate.summary", description=__doc__)
    parser.add_argument("run", help="directory of a trained model with its eval folder")
    run = parser.parse_args(argv).run
    results = load_results(run)
    # A log has no width of its own, and 80 columns would break every row.
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(summary_table(run, results))
    for result in results:
        console.print(f"{result.task}: {result.caption()}", style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
