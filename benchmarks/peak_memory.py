"""How much memory a call takes at its peak, beyond what is in use when it starts."""

import ctypes
import os
from collections.abc import Callable

import torch

_CLEAR, _STATUS = "/proc/self/clear_refs", "/proc/self/status"


def peak_extra_bytes(function: Callable[[], object], device: str) -> int | None:
    """Bytes on `device` ("cpu" or "cuda"); None where the platform does not tell.

    On the CPU it is the growth of the resident set, which counts what the results take too.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.access(_CLEAR, os.W_OK):
        return None
    _give_back_free_memory()
    with open(_CLEAR, "w") as file:
        file.write("5")  # the peak counts anew
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _give_back_free_memory() -> None:
    """What earlier calls freed would otherwise be used again without showing as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)


def _status(field: str) -> int:
    with open(_STATUS) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024
