"""The Triton kernels behind torch.ops.mpma.*_triton; imported at their first call."""

import importlib

import torch

from mpma_ext.backends import INTERPRETED, OPERATORS

# Each family has one file of kernels but the similarities, which have one a form.
STEMS = {
    "masked_attention": "masked_attention",
    "masked_attention_qkvpacked": "masked_attention",
    "masked_attention_varlen": "masked_attention",
    "memory_attention": "memory_attention",
    "token_patch_similarity": "token_patch_similarity",
    "token_patch_max_similarity": "token_patch_max_similarity",
}


def _register(operator: str, suffix: str) -> None:
    launcher = f"{operator}{suffix}"

    def run(*arguments):
        kernels = importlib.import_module(f"mpma_ext.kernels.{STEMS[operator]}")
        return getattr(kernels, launcher)(*arguments)

    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        torch.library.impl(f"mpma::{operator}_triton{suffix}", device, run)


for _name in OPERATORS:
    for _suffix in ("", "_backward"):
        _register(_name, _suffix)
