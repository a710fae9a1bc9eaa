"""`mpma prepare synthetic | mimic-cxr | csv`: from images and reports to a prepared store."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .build import BuildSettings, build_store, open_folder
from .csv_pairs import read_csv_pairs
from .manifest import Manifest
from .mimic_cxr import read_mimic_cxr
from .synthetic.write import write_raw

SYNTHETIC_PAIRS = 4400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands and their settings to the parser of `mpma prepare`."""
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    made_up = sources.add_parser("synthetic", help="write a made-up set and prepare it")
    made_up.add_argument(
        "--pairs", type=int, default=SYNTHETIC_PAIRS, help="image-report pairs (%(default)s)"
    )

    mimic = sources.add_parser("mimic-cxr", help="prepare MIMIC-CXR-JPG")
    mimic.add_argument(
        "--images", type=Path, required=True, help="directory with files/ and tables"
    )
    mimic.add_argument("--reports", type=Path, help="directory or ZIP of the free-text reports")
    mimic.add_argument(
        "--sections", type=Path, help="mimic_cxr_sectioned.csv, instead of --reports"
    )

    pairs = sources.add_parser("csv", help="prepare pairs listed in a CSV file")
    pairs.add_argument("--csv", type=Path, required=True, help="image_path, report_content, ...")

    default = BuildSettings()
    for source in (made_up, mimic, pairs):
        add = source.add_argument
        add("--out", type=Path, required=True, help="directory of the store")
        add("--side", type=int, default=default.side, help="side of stored images (%(default)s)")
        add(
            "--max-skipped",
            type=float,
            default=default.max_skipped,
            help="largest fraction of pairs that may be unreadable (%(default)s)",
        )
        add(
            "--max-pixels",
            type=int,
            default=default.max_pixels,
            help="skip larger images (%(default)s)",
        )
        add("--tokenizer", help="directory of a pretrained tokenizer; by default one is trained")
        add(
            "--vocab-size",
            type=int,
            default=default.vocab_size,
            help="largest trained vocabulary (%(default)s)",
        )
        add(
            "--workers",
            type=int,
            default=os.cpu_count() or 1,
            help="parallel workers (%(default)s)",
        )
    for source in (made_up, pairs):
        source.add_argument("--seed", type=int, default=0, help="seed of the set or of the split")


def run(args: argparse.Namespace) -> int:
    """Runs one preparation; returns the exit status, 130 after an interruption.

    Raises ValueError or OSError with a message for the user.
    """
    console = Console(stderr=True, highlight=False)
    settings = BuildSettings(
        side=args.side,
        max_skipped=args.max_skipped,
        max_pixels=args.max_pixels,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
    )
    if args.workers < 1:
        raise ValueError(f"workers must be at least 1, got {args.workers}")

    def say(line: str) -> None:
        style = "bold red" if line.startswith("WARNING") else None
        console.print(line, style=style, markup=False, soft_wrap=True)

    open_folder(args.out)
    try:
        if args.source == "synthetic":
            _draw(args, console)
        with console.status("reading tables and reports"):
            manifest = _read(args)
        with _progress(console, "decoding") as progress:
            build_store(
                manifest,
                args.out,
                settings,
                source=args.source,
                workers=args.workers,
                say=say,
                progress=progress,
            )
    except KeyboardInterrupt:
        say("interrupted: run the same command again to go on")
        return 130
    return 0


def _draw(args: argparse.Namespace, console: Console) -> None:
    if args.pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {args.pairs}")
    with _progress(console, "drawing") as progress:
        write_raw(
            args.out / "raw",
            pairs=args.pairs,
            seed=args.seed,
            workers=args.workers,
            progress=lambda done: progress(done, args.pairs),
        )


def _read(args: argparse.Namespace) -> Manifest:
    if args.source == "csv":
        return read_csv_pairs(args.csv, seed=args.seed)
    if args.source == "mimic-cxr":
        return read_mimic_cxr(args.images, args.reports, sections=args.sections)
    raw = args.out / "raw"
    manifest = read_mimic_cxr(raw, raw)
    manifest.data_use = ""
    return manifest


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
