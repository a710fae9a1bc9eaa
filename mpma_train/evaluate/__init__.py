"""Held-out evaluations: `mpma evaluate TASK --model DIR --data DIR`, one module a task.

A task's module offers `evaluate(args) -> Result`; the result's table is printed and its JSON file
written beside the model.
"""

import argparse
import importlib
from pathlib import Path

from mpma_train.output_paths import require_writable_file

TASKS = {
    "retrieval": "find the report of an image and the image of a report",
    "linear": "logistic regression on the frozen image encoder, with few labels",
    "reconstruct": "masked reports with the right image and a wrong one; masked patches",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each task; their modules load only when one runs."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="|".join(TASKS))
    by_name = {name: tasks.add_parser(name, help=text) for name, text in TASKS.items()}
    for task in by_name.values():
        task.add_argument("--model", required=True, help="directory of a trained MPMA model")
        task.add_argument("--data", required=True, help="prepared store")
        task.add_argument("--split", default="test", help="split to measure on (test)")
        task.add_argument("--seed", type=int, default=0, help="decides every random draw (0)")
        task.add_argument("--batch-size", type=int, default=64, help="pairs in a batch (64)")
    by_name["retrieval"].add_argument(
        "--score",
        choices=("global", "local", "both"),
        help="similarity that ranks; by default both, or the one the model was trained with",
    )
    by_name["reconstruct"].add_argument(
        "--draws", type=int, default=4, help="masks drawn for a pair, averaged (4)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the JSON file; returns the exit status."""
    from rich.console import Console

    from mpma_train.evaluate.results import result_path

    if Path(args.model).is_dir():
        require_writable_file("model", result_path(args.model, args.task))
    task = importlib.import_module(f"mpma_train.evaluate.{args.task}")
    result = task.evaluate(args)
    path = result.save()
    console = Console()
    console.print(result.table())
    console.print(result.caption(), style="dim")
    console.print(f"written to {path}", style="dim")
    return 0
