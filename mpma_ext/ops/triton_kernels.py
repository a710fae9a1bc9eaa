"""The Triton kernels behind torch.ops.mpma.*_triton; imported at their first call."""

import importlib
from collections.abc import Callable

import torch

from mpma_ext.backends import INTERPRETED, OPERATORS

# The forms of attention share a file; every other operator has one of its own name.
_FILES = {
    "masked_attention_qkvpacked": "masked_attention",
    "masked_attention_varlen": "masked_attention",
}


def launcher(name: str) -> Callable:
    """The launcher of an operator or of its backward, which may have a file of its own."""
    operator = name.removesuffix("_backward")
    kernels = importlib.import_module(f"mpma_ext.kernels.{_FILES.get(operator, operator)}")
    if not hasattr(kernels, name):
        kernels = importlib.import_module(f"{kernels.__name__}_backward")
    return getattr(kernels, name)


def _register(operator: str, suffix: str) -> None:
    def run(*arguments):
        with torch.cuda.device_of(arguments[0]):  # where Triton launches; nothing on the CPU
            return launcher(f"{operator}{suffix}")(*arguments)

    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        torch.library.impl(f"mpma::{operator}_triton{suffix}", device, run)


if INTERPRETED:
    importlib.import_module("mpma_ext.kernels.interpreter").repair()
for _name in OPERATORS:
    for _suffix in ("", "_backward"):
        _register(_name, _suffix)
