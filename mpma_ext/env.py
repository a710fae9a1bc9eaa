"""What this installation is and what it can run."""

import importlib.metadata
import platform
import sys

import torch

import mpma_ext
from mpma_ext.backends import COMPILED, OPERATORS, available_backends

_PACKAGES = ("triton", "transformers", "accelerate", "timm", "einops", "numpy")


def report() -> str:
    """A few lines for a bug report: versions, machine, backends, compiled operators."""
    lines = [
        f"mpma         {mpma_ext.__version__}",
        f"python       {sys.version.split()[0]} on {platform.platform()}",
        f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        *(f"{name:<12} {_version(name)}" for name in _PACKAGES),
        f"CPU          {torch.get_num_threads()} threads, {mpma_ext._C.cpu_instructions()}",
        f"GPU          {_gpu()}",
        f"backends     {', '.join(available_backends())}",
        "compiled operators",
        *(f"  {name:<28} {_compiled(name)}" for name in OPERATORS),
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none usable"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{torch.cuda.device_count()} × {properties.name}, "
        f"sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GB"
    )


def _compiled(operator: str) -> str:
    served = [backend for backend, operators in COMPILED.items() if operator in operators]
    return ", ".join(served) or "reference only"
