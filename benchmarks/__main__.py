"""`python -m benchmarks`: measure, write the results and print them as tables."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.report import read_results, rich_table, tables_of
from benchmarks.sets import SETS

FOLDER = Path(__file__).parent
SCRIPTS = {
    "masked_attention": "bench_masked_attention.py",
    "masked_attention_qkvpacked": "bench_masked_attention.py",
    "masked_attention_varlen": "bench_masked_attention.py",
    "memory_attention": "bench_memory_attention.py",
    "token_patch_similarity": "bench_token_patch_similarity.py",
    "token_patch_max_similarity": "bench_token_patch_similarity.py",
    "training_step": "bench_training_step.py",
}
SUITE_OPTIONS = ("device", "threads", "backend", "seconds", "results")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; pytest's exit status, so that not 0 is what failed or could not be measured.

    What is not known here goes to pytest, such as `-k sdpa` or `-x`.
    """
    args, rest = _parser().parse_known_args(argv)
    asked = {case.operator for name in args.shapes for case in SETS[name]()}
    operators = [name for name in args.operator or SCRIPTS if name in asked]
    if not operators:
        print(f"no case of {', '.join(args.operator)} in {', '.join(args.shapes)}", file=sys.stderr)
        return 2
    options = [f"--shapes={name}" for name in args.shapes]
    for name in SUITE_OPTIONS:
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        options += [f"--{name}={each}" for each in values if each is not None]
    pytest_options = [
        *("--rootdir", str(FOLDER.parent), "-c", str(FOLDER.parent / "pyproject.toml")),
        *("-o", "python_functions=bench_*", "-p", "no:cacheprovider", "--benchmark-quiet"),
    ]
    nodes = [f"{FOLDER / SCRIPTS[name]}::bench_{name}" for name in operators]
    status = pytest.main([*nodes, *options, *pytest_options, *rest])

    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        _print_tables(args, operators)
    return int(status)


def _print_tables(args: argparse.Namespace, operators: Sequence[str]) -> None:
    """What this machine's files now hold of the sets and operators asked for."""
    here = describe(args.device)["device"]
    rows = [row for row in read_results(args.results) if row.machine["device"] == here]
    # A file has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables_of(rows, args.shapes, operators):
        console.print(rich_table(table))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.partition(": ")[2],
        allow_abbrev=False,
        epilog="Further options are pytest's, such as -k sdpa or -x.",
    )
    sets = ", ".join(name for name in SETS if name != "smoke")
    parser.add_argument(
        "--shapes", nargs="+", default=["quick"], choices=SETS, metavar="SET", help=sets
    )
    parser.add_argument(
        "--operator", nargs="+", choices=SCRIPTS, metavar="NAME", help="all by default"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU (2)")
    parser.add_argument("--backend", nargs="+", help="all compiled ones of the device by default")
    parser.add_argument("--seconds", type=float, help="spent on the pairs of a case (6)")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
