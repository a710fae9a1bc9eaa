"""Stage repeatability: the same bits in 100 runs of forward and backward, and in a captured graph.

The calls are of a model's size, so that many blocks run beside each other.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.calls import DTYPES, MODEL, Call
from benchmarks.gpu.steps import write_report
from benchmarks.problem import Problem

RUNS = 100
BITS = {2: torch.int16, 4: torch.int32}


def same_bits(results: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are equal bit by bit, NaN too."""
    return all(
        torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))
        for a, b in zip(results, others, strict=True)
    )


def different_runs(problem: Problem, runs: int = RUNS) -> int:
    """How many of `runs` runs differ from the first."""
    first = problem()
    return sum(not same_bits(problem(), first) for _ in range(runs - 1))


def same_in_a_graph(problem: Problem) -> bool:
    """Whether a captured graph, replayed twice, gives the bits of a run without one."""
    first = problem()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a graph is captured after a run on another stream
        elsewhere = problem()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem()
    graph.replay()
    graph.replay()
    return same_bits(elsewhere, first) and same_bits(results, first)


def repeat(call: Call, dtype: str, backend: str) -> dict:
    """What became of one call: how many runs differ, and whether a graph does."""
    found = {"call": str(call), "dtype": dtype, "runs": RUNS}
    try:
        problem = call.problem(dtype, backend, "cuda")
        found["different"] = different_runs(problem)
        found["same_in_a_graph"] = same_in_a_graph(problem)
    except Exception as error:  # the next call may do better
        found["error"] = f"{type(error).__name__}: {error}"[:500]
    found["passed"] = found.get("different") == 0 and found.get("same_in_a_graph", False)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Repeat the calls of one backend: 0 where all bits are the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.repeatability")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    found = []
    for dtype in DTYPES:
        for call in MODEL:
            found.append(repeat(call, dtype, arguments.backend))
            print(found[-1], flush=True)
            wrong = [each for each in found if not each["passed"]]
            reason = f"{len(wrong)} of {len(found)} calls did not repeat" if wrong else ""
            write_report(arguments.report, found, reason)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
