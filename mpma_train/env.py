"""`mpma env`: versions, devices and operator backends; with `--parameters`, a model's size."""

import argparse

from mpma_ext.env import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mpma env`."""
    parser.add_argument(
        "--parameters",
        metavar="CONFIG",
        help="print the parameter table of a preset (mpma_base) or of a configuration file",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report or the table."""
    if args.parameters is None:
        print(report())
        return 0
    # Only the table needs transformers, which takes seconds to import.
    from mpma_train.models import MpmaConfig
    from mpma_train.models.parameters import format_table, parameter_table
    from mpma_train.settings import parse_settings

    config = MpmaConfig(**parse_settings([args.parameters]).model)
    print(format_table(parameter_table(config)))
    return 0
