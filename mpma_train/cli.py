"""The command `mpma`: only wiring. Every area has its own `add_arguments` and `run`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# Imported when called for, so that `mpma --help` does not wait for torch.
_COMMANDS = {
    "prepare": ("mpma_train.data.prepare", "turn raw data into a store to train on"),
    "evaluate": ("mpma_train.evaluate", "measure a model on held-out pairs"),
    "convert": ("mpma_train.convert", "start a model from published encoder weights"),
    "export": ("mpma_train.export", "write the encoders for transformers or timm"),
    "embed": ("mpma_train.embed", "write the embeddings of a split to a file"),
    "env": ("mpma_train.env", "report versions, devices and operator backends"),
}
# These read their arguments themselves.
_OWN_PARSER = {
    "pretrain": (
        "mpma_train.pretrain",
        "pretrain a model: mpma pretrain CONFIG.yaml [--setting value ...]",
    ),
    "profile": ("mpma_train.profile", "show where the time of a few training steps goes"),
    "bench": ("mpma_train.bench", "measure the operators beside PyTorch's own, in a checkout"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its exit status: 2 for bad input, 1 for training that stopped at a loss that is not finite;
        both print one line that begins with `mpma: error:`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in _OWN_PARSER:
            module_name, _ = _OWN_PARSER[argv[0]]
            return importlib.import_module(module_name).run(argv[1:])
        args = _parser(argv).parse_args(argv)
        return args.run(args)
    except FloatingPointError as error:
        return _fail(error, 1)
    except (ValueError, OSError) as error:
        return _fail(error, 2)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpma", description="Multi-task paired masking with alignment for radiographs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, description) in _OWN_PARSER.items():
        commands.add_parser(name, help=description)
    for name, (module_name, description) in _COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _fail(error: Exception, status: int) -> int:
    # Under torchrun every process fails alike; one says so.
    if os.environ.get("RANK", "0") == "0":
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"mpma: error: {message}", file=sys.stderr)
    return status
