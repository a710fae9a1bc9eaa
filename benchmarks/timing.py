"""Two functions timed in turn, so that whatever disturbs the machine disturbs both."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

FEWEST_PAIRS, MOST_PAIRS = 5, 200
# More than the last-level cache of any GPU, overwritten before each call there.
FLUSHED_BYTES = 2**28

Clock = Callable[[Callable[[], object]], float]


def wall_clock(function: Callable[[], object]) -> float:
    """Seconds a call takes on the CPU; its results are freed after the clock has stopped."""
    start = time.perf_counter()
    results = function()
    seconds = time.perf_counter() - start
    del results
    return seconds


class DeviceClock:
    """Seconds between two events of the GPU around a call, its level-2 cache flushed before.

    The call is launched while the flush still runs, which hides the first launches' latency.
    """

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, function: Callable[[], object]) -> float:
        """Time one call, and wait for the device after the second event."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        results = function()
        end.record()
        torch.cuda.synchronize()
        del results
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Pairs:
    """Seconds of ours and of the baseline, one entry a pair of runs."""

    ours: np.ndarray
    baseline: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """How many times as long as ours the baseline took, pair by pair."""
        return self.baseline / self.ours


def paired(
    benchmark,
    clock: Clock,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    seconds: float,
) -> Pairs:
    """Run baseline, ours, baseline, ours …: as many pairs as fit into `seconds`, 5 to 200.

    Args:
        benchmark: the fixture of pytest-benchmark, whose rounds are ours.
        clock: times both alike.
        ours, baseline: called once before anything counts.
        seconds: what the measurement may take, roughly.
    """
    once = clock(baseline) + clock(ours)
    if once < seconds:  # again: the first time, caches and allocators were cold
        once = clock(baseline) + clock(ours)
    rounds = min(MOST_PAIRS, max(FEWEST_PAIRS, int(seconds / once)))
    times: tuple[list[float], list[float]] = ([], [])
    benchmark.pedantic(
        lambda: times[0].append(clock(ours)),
        setup=lambda: times[1].append(clock(baseline)),
        rounds=rounds,
    )
    return Pairs(*map(np.array, times))
