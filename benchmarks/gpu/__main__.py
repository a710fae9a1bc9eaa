"""`python -m benchmarks.gpu`: run the stages, write what they found, print the tables."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import benchmarks.gpu
from benchmarks.gpu.device import describe_gpu
from benchmarks.gpu.steps import (
    FAILED,
    GRACE,
    OUT_OF_TIME,
    ROOT,
    STAGES,
    TIMINGS,
    run_all,
    steps,
    write_checks,
)
from benchmarks.gpu.tables import BACKENDS, read, tables
from benchmarks.machine import slug
from benchmarks.report import rich_table
from mpma_ext.backends import available_backends


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where every step passed, or was skipped for a reason that is printed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no usable GPU here")
    if importlib.util.find_spec("mpma_ext.kernels") is None:
        parser.error(
            "no mpma_ext.kernels: without `pip install`, `ln -s ../kernels mpma_ext/kernels`"
        )
    serving = [name for name in arguments.backend if name in available_backends()]
    for name in set(arguments.backend) - set(serving):
        print(f"skipped: {name} is not in this installation", flush=True)
    if not serving:
        parser.error(f"none of {', '.join(arguments.backend)} is in this installation")
    machine = describe_gpu()
    print(machine, flush=True)
    results = arguments.out.resolve()
    folder = results / slug(machine["device"])
    options = ("--seconds", str(arguments.seconds), "--results", str(results))
    every = list(steps(arguments.stage, serving, arguments.operator, options))
    outcomes = run_all(
        every, arguments.limit - GRACE, record=partial(write_checks, folder, machine)
    )
    if "timings" in arguments.stage:
        _print_tables(folder)
    for step, outcome in zip(every, outcomes, strict=True):
        reason = outcome.reason and f": {outcome.reason}"
        print(f"{step.stage}, {step.name}: {outcome.status}{reason}")
    return int(any(outcome.status in (FAILED, OUT_OF_TIME) for outcome in outcomes))


def _print_tables(folder: Path) -> None:
    # A file has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 220)
    for table in tables(read(folder)):
        console.print(rich_table(table))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="all of them")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument(
        "--operator", nargs="+", choices=TIMINGS, default=tuple(TIMINGS), help="of the timings"
    )
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything (570)")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on a shape's timings")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"),
        metavar="DIR",
        help="folder to write to; by default $OUT or benchmarks/results",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
