"""torch.compile as a baseline."""

import functools
import os
import shutil
from collections.abc import Callable

import torch


def compiled(function: Callable) -> Callable:
    """torch.compile of `function`, one graph, anew for every shape; compiled at the first call."""

    @functools.cache
    def compile_once():
        return torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return compile_once()(*args, **kwargs)

    return wrapper


def missing_compiler() -> str | None:
    """Why torch.compile cannot generate code here, or None."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a C++ compiler, and none of {', '.join(names)} is on PATH"
