"""Options of the suite, the fixture that measures, and the files it writes.

Every script is a list of functions `bench_<operator>(case, backend, contest)`. `python -m
benchmarks` runs them with pytest.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.baselines.compiled import missing_compiler
from benchmarks.flops import Work
from benchmarks.machine import describe, gemm_gflops, slug
from benchmarks.peak_memory import peak_extra_bytes
from benchmarks.sets import SETS
from benchmarks.shapes import Case
from benchmarks.timing import Clock, DeviceClock, paired, wall_clock
from mpma_ext.backends import available_backends

FOLDER = Path(__file__).parent
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Rows of results by operator and set of cases.
ROWS = pytest.StashKey[dict[str, dict[str, list[dict]]]]()
BACKENDS = pytest.StashKey[list[str]]()
MACHINE = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of operators")
    group.addoption("--shapes", action="append", choices=SETS, help="set of cases; quick")
    group.addoption("--device", default="cpu", choices=KERNELS)
    group.addoption("--threads", type=int, default=2, help="of PyTorch on the CPU")
    group.addoption("--backend", action="append", help="all compiled ones of the device")
    group.addoption("--seconds", type=float, default=6.0, help="spent on the pairs of a case")
    group.addoption("--results", type=Path, default=FOLDER / "results", help="folder to write to")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("threads"))
    device = config.getoption("device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: PyTorch sees no usable GPU here")
    kernels = [name for name in KERNELS[device] if name in available_backends()]
    config.stash[BACKENDS] = config.getoption("backend") or kernels
    if not config.stash[BACKENDS]:
        raise pytest.UsageError(f"no compiled backend serves {device} here: name one by --backend")
    config.stash[ROWS] = defaultdict(lambda: defaultdict(list))


def pytest_generate_tests(metafunc):
    config = metafunc.config
    operator = metafunc.function.__name__.removeprefix("bench_")
    chosen = [
        (name, case)
        for name in config.getoption("shapes") or ["quick"]
        for case in SETS[name]()
        if case.operator == operator
    ]
    identifiers = [f"{name}-{case}" for name, case in chosen]
    metafunc.parametrize(("shape_set", "case"), chosen, ids=identifiers)
    metafunc.parametrize("backend", config.stash[BACKENDS])


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    return pytestconfig.getoption("device")


@pytest.fixture(scope="session")
def clock(device) -> Clock:
    return DeviceClock() if device == "cuda" else wall_clock


@pytest.fixture
def gemm(pytestconfig, device, clock) -> None:
    """GFLOP/s of matrix products by dtype, again before every case: the best of all counts.

    What disturbs the machine for a moment does not flatter the shares of this rate.
    """
    stash = pytestconfig.stash
    if MACHINE not in stash:
        stash[MACHINE] = describe(device) | {"gemm_gflops": {"float32": 0.0, "bfloat16": 0.0}}
    best = stash[MACHINE]["gemm_gflops"]
    for name, rate in best.items():
        best[name] = max(rate, round(gemm_gflops(device, getattr(torch, name), clock), 1))


@pytest.fixture
def contest(
    pytestconfig, benchmark, clock, gemm, device, shape_set, case: Case, backend
) -> Callable[..., None]:
    """Time ours against the baseline in turn, and keep what came out as one row of results.

    `work` counts operations; None where that means nothing.
    """
    if case.baseline == "compiled":
        reason = missing_compiler()
        if reason is not None:
            pytest.skip(reason)
        torch.compiler.reset()  # a graph a shape, and dynamo keeps a few only

    def run(ours: Callable[[], object], baseline: Callable[[], object], work: Work | None = None):
        seconds = pytestconfig.getoption("seconds")
        pairs = paired(benchmark, clock, ours, baseline, seconds)
        row = _labels(case) | {"backend": backend, "pairs": len(pairs.ours)}
        row |= _quantiles("ratio", pairs.ratios)
        contestants = (("ours", ours, pairs.ours), ("baseline", baseline, pairs.baseline))
        for name, function, times in contestants:
            rate = None if work is None else 1e-9 * work.needed / float(np.median(times))
            row |= _quantiles(f"{name}_ms", 1e3 * times)
            row[f"{name}_gflops"] = rate and _short(rate)
            row[f"{name}_peak_bytes"] = peak_extra_bytes(function, device)
        row["ours_done_gflop"] = work and _short(1e-9 * work.done)
        benchmark.extra_info.update(row)
        pytestconfig.stash[ROWS][case.operator][shape_set].append(row)

    return run


def pytest_sessionfinish(session):
    """One file an operator; a set that was measured again replaces its former self."""
    config = session.config
    for operator, sets in config.stash[ROWS].items():
        machine = config.stash[MACHINE]
        path = config.getoption("results") / slug(machine["device"]) / f"{operator}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text())["sets"] if path.exists() else {}
        new = {name: {"machine": machine, "rows": rows} for name, rows in sets.items()}
        path.write_text(json.dumps({"operator": operator, "sets": kept | new}, indent=1) + "\n")


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return {name: _short(middle), f"{name}_p20": _short(low), f"{name}_p80": _short(high)}


def _short(value: float) -> float:
    """Five digits, more than any timing has."""
    return float(f"{value:.5g}")


def _labels(case: Case) -> dict[str, object]:
    """What a row is about: the case with its shape both as text and as sizes."""
    return asdict(case) | {"shape": str(case.shape), "sizes": asdict(case.shape)}
