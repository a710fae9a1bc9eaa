"""The GPU: a clock for its work, the rates it reaches, and what it is."""

import importlib.metadata
import math
import time
from collections.abc import Callable

import torch

from benchmarks.machine import GEMM_SIDE, describe
from benchmarks.timing import FLUSHED_BYTES

DEVICE = "cuda"
MOST_FLUSHES = 64
RATE_RUNS = 10
COPIED_BYTES = 2**30
PACKAGES = ("triton", "late-interaction-kernels", "flash-maxsim")


class GpuClock:
    """Seconds of the GPU between two events around a call, its level-2 cache flushed before.

    The flush is repeated for as long as the CPU takes to launch the call, so that the GPU never
    waits for a launch: what short calls cost on the CPU is not in it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
        self._flush()
        self._flush_seconds = min(self(self._flush) for _ in range(RATE_RUNS))

    def __call__(self, function: Callable[[], object], flushes: int = 1) -> float:
        """Time one call, and wait for the GPU; the results are freed after that."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self._flush()
        start.record()
        results = function()
        end.record()
        torch.cuda.synchronize()
        del results
        return start.elapsed_time(end) / 1e3

    def flushes(self, function: Callable[[], object]) -> int:
        """How many flushes last longer than the CPU takes to launch `function`, which has run."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        results = function()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        del results
        return min(MOST_FLUSHES, 1 + math.ceil(2 * seconds / self._flush_seconds))

    def _flush(self) -> None:
        self._memory.zero_()


def rates(clock: GpuClock) -> dict[str, object]:
    """Of matrix products in GFLOP/s by dtype, and of a copy in GB/s, read and written: the best."""
    side, gemm = GEMM_SIDE["cuda"], {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(side, side, device=DEVICE, dtype=getattr(torch, name)) for _ in "ab")
        best = min(clock(lambda a=a, b=b: a @ b) for _ in range(RATE_RUNS))
        gemm[name] = round(2e-9 * side**3 / best, 1)
    source = torch.randint(256, (COPIED_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best = min(clock(lambda: target.copy_(source)) for _ in range(RATE_RUNS))
    return {"gemm_gflops": gemm, "copy_gb_per_second": round(2e-9 * COPIED_BYTES / best, 1)}


def describe_gpu() -> dict[str, object]:
    """What every file of results says of the machine."""
    properties = torch.cuda.get_device_properties(0)
    return describe("cuda") | {
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
