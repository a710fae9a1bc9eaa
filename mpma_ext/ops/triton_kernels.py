"""The Triton kernels behind torch.ops.mpma.*_triton; imported at their first call."""

import importlib

import torch

from mpma_ext.backends import INTERPRETED, OPERATORS

# The forms of attention share a file; every other operator has one of its own name.
_FILES = {
    "masked_attention_qkvpacked": "masked_attention",
    "masked_attention_varlen": "masked_attention",
}


def _register(operator: str, suffix: str) -> None:
    launcher = f"{operator}{suffix}"

    def run(*arguments):
        kernels = importlib.import_module(f"mpma_ext.kernels.{_FILES.get(operator, operator)}")
        if not hasattr(kernels, launcher):  # a long backward has a file of its own
            kernels = importlib.import_module(f"{kernels.__name__}_backward")
        with torch.cuda.device_of(arguments[0]):  # where Triton launches; nothing on the CPU
            return getattr(kernels, launcher)(*arguments)

    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        torch.library.impl(f"mpma::{operator}_triton{suffix}", device, run)


if INTERPRETED:
    importlib.import_module("mpma_ext.kernels.interpreter").repair()
for _name in OPERATORS:
    for _suffix in ("", "_backward"):
        _register(_name, _suffix)
