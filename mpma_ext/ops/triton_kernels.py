"""The Triton kernels behind torch.ops.mpma.*_triton; imported at their first call."""

import importlib

import torch

from mpma_ext.backends import INTERPRETED, KERNEL_FILES, OPERATORS


def _register(operator: str, suffix: str) -> None:
    launcher = f"{operator}{suffix}"

    def run(*arguments):
        kernels = importlib.import_module(f"mpma_ext.kernels.{KERNEL_FILES[operator]}")
        if not hasattr(kernels, launcher):  # a long backward has a file of its own
            kernels = importlib.import_module(f"{kernels.__name__}_backward")
        return getattr(kernels, launcher)(*arguments)

    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        torch.library.impl(f"mpma::{operator}_triton{suffix}", device, run)


if INTERPRETED:
    importlib.import_module("mpma_ext.kernels.interpreter").repair()
for _name in OPERATORS:
    for _suffix in ("", "_backward"):
        _register(_name, _suffix)
