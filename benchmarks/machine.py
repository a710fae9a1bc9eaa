"""What the measurements are made on, and how fast it multiplies matrices."""

import datetime
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import Clock

ROOT = Path(__file__).resolve().parents[1]
GEMM_SIDE = {"cpu": 1536, "cuda": 8192}
GEMM_TRIAL_SIDE, GEMM_RUNS = 256, 3


def describe(device: str) -> dict[str, object]:
    """Names and versions, for the head of a file of results."""
    threads = torch.get_num_threads()
    cpu = f"{cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def slug(name: str) -> str:
    """A device's name as that of a folder: lower case, dashes for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """The processor's own name where Linux tells, or that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, "-dirty" where files other than the results themselves differ."""
    status = ("status", "--porcelain", "--untracked-files=no")
    try:
        changed = _git(*status, "--", ".", ":!benchmarks/results", ":!README.md")
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def gemm_gflops(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """GFLOP/s of a square matrix product, the fastest run of the fastest way here.

    On the CPU these are torch.mm (MKL in float32), oneDNN, and a product in float32 between two
    conversions, since a processor without bfloat16 arithmetic takes a hundred times as long for
    bfloat16's own.
    """
    products = [torch.mm]
    if device == "cpu":
        products += [_by_conversion] if dtype != torch.float32 else []
        products += [_one_dnn] if torch.backends.mkldnn.is_available() else []

    def seconds(product: Callable, side: int) -> float:
        a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
        try:
            return clock(lambda: product(a, b))
        except RuntimeError:  # oneDNN has no bfloat16 on an older processor
            return float("inf")

    def fastest(side: int, runs: int) -> dict[Callable, float]:
        return {p: min(seconds(p, side) for _ in range(runs)) for p in products}

    trial = fastest(GEMM_TRIAL_SIDE, 3)
    products = [p for p in products if trial[p] < 3 * min(trial.values())]
    side = GEMM_SIDE[device]
    return 2e-9 * side**3 / min(fastest(side, GEMM_RUNS).values())


def _one_dnn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _by_conversion(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a.float(), b.float()).to(a.dtype)
