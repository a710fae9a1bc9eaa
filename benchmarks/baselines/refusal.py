"""What a baseline raises where it cannot serve: not an error of the benchmark, but a finding."""

import importlib
from types import ModuleType


class RefusalError(RuntimeError):
    """The reason why a baseline computes nothing here, for the results."""


def optional(module: str) -> ModuleType:
    """The module, where it is installed.

    Raises:
        RefusalError: it is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RefusalError(f"{module} is not installed") from error
