"""The stages that measure, on the CPU: what is timed, what is left out and why, and the tables."""

import argparse
import contextlib
import json
import math
import sys
import time
from types import ModuleType

import pytest
import torch
from test_suite import FIELDS

import mpma_ext
from benchmarks.baselines import BASELINES
from benchmarks.baselines.refusal import RefusalError
from benchmarks.goals import COPY_SHARE, DEVICE_GOALS, EXTRA_BYTES, GEMM_SHARE, RATIO, DeviceGoal
from benchmarks.gpu import calls, device, repeatability, tables, timings
from benchmarks.gpu.tables import Measured
from benchmarks.machine import describe
from benchmarks.sets import SETS
from benchmarks.shapes import FORWARD, TRAINING, Attention, Memory, Reports, Similarity, every
from benchmarks.timing import wall_clock
from mpma_ext import reference

MACHINE = {"device": "Some GPU", "copy_gb_per_second": 4000.0}
MACHINE |= {"gemm_gflops": {"float32": 5e4, "bfloat16": 8e5}}
SMALL = Attention(2, 9, 2, 8, padded=False)


class Clock:
    """As the GPU's, by the wall."""

    def __call__(self, function, flushes=1):
        return wall_clock(function)

    def flushes(self, function):
        return 1


def measure(monkeypatch, tmp_path, operator, cases, backends=("cpu",)):
    monkeypatch.setitem(SETS, "gpu", lambda: iter(cases))
    options = {"seconds": 0.01, "results": tmp_path, "report": tmp_path / "report.json"}
    arguments = argparse.Namespace(**options)
    return timings.measure(operator, backends, Clock(), MACHINE, arguments, device="cpu")


def test_rows_have_the_form_of_the_other_results(monkeypatch, tmp_path):
    both = every("masked_attention", [SMALL], ("eager", "sdpa"), modes=(FORWARD, TRAINING))
    measure(monkeypatch, tmp_path, "masked_attention", list(both), ("cpu", "reference"))
    path = tmp_path / "some-gpu" / "masked_attention.json"
    content = json.loads(path.read_text())
    assert content["operator"] == path.stem and list(content["sets"]) == ["gpu"]
    measured = content["sets"]["gpu"]
    assert measured["machine"] == MACHINE and measured["absent"] == []
    found = [(row["mode"], row["baseline"], row["backend"]) for row in measured["rows"]]
    assert len(set(found)) == len(found) == 2 * 2 * 2
    for row in measured["rows"]:
        assert set(row) == FIELDS
        assert 0 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert row["pairs"] >= 5 and row["ours_ms"] > 0 and row["ours_gflops"] > 0
    # What is measured again replaces itself alone.
    content["sets"]["other"] = {"machine": {}, "rows": []}
    path.write_text(json.dumps(content))
    some = every("masked_attention", [SMALL], ("sdpa",))
    measure(monkeypatch, tmp_path, "masked_attention", list(some))
    sets = json.loads(path.read_text())["sets"]
    assert set(sets) == {"gpu", "other"} and len(sets["gpu"]["rows"]) == 1


@pytest.mark.parametrize("operator", timings.SCRIPTS)
def test_every_operator_is_timed(operator, monkeypatch, tmp_path):
    small = {
        "masked_attention": SMALL,
        "masked_attention_varlen": Reports(3, 2, 8),
        "memory_attention": Memory(2, 5, 2, 8, 40, 4),
        "token_patch_similarity": Similarity(2, 5, 7, 8),
        "token_patch_max_similarity": Similarity(2, 5, 7, 8),
    }
    cases = list(every(operator, [small[operator]], ("eager",)))
    measured = measure(monkeypatch, tmp_path, operator, cases)
    assert [row["baseline"] for row in measured["rows"]] == ["eager"]


def test_packed_rows_meet_a_baseline_on_packed_rows(monkeypatch, tmp_path):
    module = ModuleType("varlen")
    module.varlen_attn = reference.masked_attention_varlen
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    both = every("masked_attention_varlen", [Reports(3, 2, 8)], ("eager", "varlen"), ("bfloat16",))
    measured = measure(monkeypatch, tmp_path, "masked_attention_varlen", list(both))
    assert measured["absent"] == []
    assert [row["baseline"] for row in measured["rows"]] == ["eager", "varlen"]


def test_what_refuses_is_no_failure_and_what_differs_is(monkeypatch, tmp_path):
    def refuse(query, key, value, key_padding_mask):
        raise RefusalError("not on this machine")

    def break_down(query, key, value, key_padding_mask):
        raise ValueError("broken")

    def differ(query, key, value, key_padding_mask):
        return BASELINES["masked_attention"]["eager"](query, key, 2 * value)

    names = ("refuse", "break_down", "differ", "sdpa")
    for function in (refuse, break_down, differ):
        monkeypatch.setitem(BASELINES["masked_attention"], function.__name__, function)
    cases = list(every("masked_attention", [SMALL], names))
    measured = measure(monkeypatch, tmp_path, "masked_attention", cases, ("cpu", "reference"))
    assert [row["baseline"] for row in measured["rows"]] == ["sdpa", "sdpa"]
    absent = {(a["baseline"], a["backend"]): a for a in measured["absent"]}
    # What refused once is not asked again, what failed is.
    others = [(name, backend) for name in names[1:3] for backend in ("cpu", "reference")]
    assert set(absent) == {("refuse", "cpu"), *others}
    assert absent["refuse", "cpu"]["refused"]
    assert absent["refuse", "cpu"]["reason"] == "RefusalError: not on this machine"
    assert not absent["break_down", "cpu"]["refused"]
    assert not absent["differ", "cpu"]["refused"]
    assert "differ by more than" in absent["differ", "cpu"]["reason"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reason"] == "4 comparisons failed"


@pytest.mark.parametrize("factor", [1, 2])
def test_an_error_of_others_code_is_no_failure_but_other_results_are(factor, monkeypatch, tmp_path):
    def other(query, key, value, key_padding_mask):
        assert factor != 1, "a compiler's own"
        return BASELINES["masked_attention"]["eager"](query, key, factor * value)

    monkeypatch.setitem(BASELINES["masked_attention"], "flex", other)
    cases = list(every("masked_attention", [SMALL], ("flex",)))
    (absent,) = measure(monkeypatch, tmp_path, "masked_attention", cases)["absent"]
    assert absent["refused"] == (factor == 1)


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path):
    right = mpma_ext.masked_attention

    def wrong(query, key, value, *, backend, **others):
        return right(query, key, value, backend=backend, **others) * (2 if backend == "cpu" else 1)

    monkeypatch.setattr(mpma_ext, "masked_attention", wrong)
    cases = list(every("masked_attention", [SMALL], ("eager", "sdpa")))
    measured = measure(monkeypatch, tmp_path, "masked_attention", cases, ("cpu", "reference"))
    assert {row["backend"] for row in measured["rows"]} == {"reference"}
    assert {a["backend"] for a in measured["absent"]} == {"cpu"}


def test_the_slow_is_told_from_the_fast():
    slow, fast = timings.in_turn(Clock(), [lambda: time.sleep(0.02), lambda: None], seconds=0.1)
    assert len(slow) == len(fast) >= timings.FEWEST_ROUNDS
    assert (slow > fast).all()


def test_what_needs_a_compiler_comes_last():
    for operator in timings.SCRIPTS:
        compiled = [
            {case.baseline in timings.COMPILED for case in group.cases}
            for group in timings.groups(operator)
        ]
        assert all(len(kinds) == 1 for kinds in compiled)
        flat = [kinds.pop() for kinds in compiled]
        assert flat == sorted(flat)
    cases = [case for name in timings.SCRIPTS for g in timings.groups(name) for case in g.cases]
    assert sorted(map(str, cases)) == sorted(map(str, SETS["gpu"]()))


def test_the_set_gpu_is_what_the_goals_need():
    cases = {(c.operator, c.shape, c.mode): set() for c in SETS["gpu"]()}
    for case in SETS["gpu"]():
        cases[case.operator, case.shape, case.mode].add(case.baseline)
    for goal in DEVICE_GOALS:
        found = cases[goal.operator, goal.shape, goal.mode]
        assert found >= set(goal.against) - {"triton"}, goal


# ---- repeatability ------------------------------------------------------------------------------


def test_a_run_that_differs_is_counted():
    call = calls.SMALL[0].problem("float32", "cpu", "cpu")
    assert repeatability.different_runs(call, runs=3) == 0
    runs = iter([1.0, 1.0, -0.0, math.nan, 1.0])
    assert repeatability.different_runs(lambda: [torch.tensor([next(runs)])], runs=5) == 2
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert repeatability.same_bits([nan], [nan]) and not repeatability.same_bits([zero], [-zero])


def test_a_call_that_fails_is_said(monkeypatch, tmp_path):
    """All of them, where there is no GPU; the stage itself goes through every call."""
    monkeypatch.setattr(repeatability, "MODEL", calls.SMALL[:2])
    monkeypatch.setattr(
        calls.Call, "problem", lambda *arguments: (_ for _ in ()).throw(OSError("no device"))
    )
    report = tmp_path / "report.json"
    assert repeatability.main(["--backend", "cuda", "--report", str(report)]) == 1
    written = json.loads(report.read_text())
    assert written["reason"] == "4 of 4 calls did not repeat"
    assert {found["error"] for found in written["details"]} == {"OSError: no device"}


def test_calls_are_of_every_operator_and_differ_where_seeds_do():
    for some in (calls.SMALL, calls.MODEL):
        assert {call.operator for call in some} == set(mpma_ext.backends.OPERATORS)
    for call in calls.SMALL:
        for dtype in calls.DTYPES:
            results = call.problem(dtype, "cpu", "cpu")()
            expected = call.problem(dtype, "reference", "cpu")()
            for got, want in zip(results, expected, strict=True):
                assert got.shape == want.shape and got.isfinite().all() and got.any()
    assert calls.main(["--backend", "cpu", "--device", "cpu"]) == 0


# ---- tables -------------------------------------------------------------------------------------


def row(goal, baseline, backend, **values):
    """A row about a goal's shape, of 1 ms where `values` do not say otherwise."""
    row = {"operator": goal.operator, "shape": str(goal.shape), "mode": goal.mode}
    row |= {"baseline": baseline, "backend": backend, "ratio": 1.0}
    for side in ("ours", "baseline"):
        row |= {f"{side}_ms": 1.0, f"{side}_gflops": 4e5, f"{side}_peak_bytes": 2 * 10**6}
    return row | values


def refusal(goal, baseline):
    about = {"operator": goal.operator, "shape": str(goal.shape), "mode": goal.mode}
    about |= {"baseline": baseline, "backend": "cuda", "dtype": "bfloat16"}
    return about | {"refused": True, "reason": "RefusalError: not installed"}


def judged(goal, rows, absent=(), backend="cuda"):
    return tables.judgement(goal, backend, Measured(MACHINE, list(rows), list(absent)))


def test_a_ratio_is_to_the_fastest_baseline():
    goal = DeviceGoal("masked_attention", SMALL, RATIO, 1.3, ("sdpa", "flex"))
    sdpa, flex = row(goal, "sdpa", "cuda", ratio=1.3), row(goal, "flex", "cuda", ratio=1.6)
    assert judged(goal, [sdpa, flex]) == "1.30 × sdpa: yes"
    assert judged(goal, [sdpa | {"ratio": 1.2999}, flex]) == "1.30 × sdpa: **no**"
    # One that is not measured might be faster; one that refuses is not.
    assert judged(goal, [sdpa]) == "not measured (flex)"
    assert judged(goal, [sdpa], [refusal(goal, "flex")]) == "1.30 × sdpa: yes"
    nobody = [refusal(goal, "sdpa"), refusal(goal, "flex")]
    assert judged(goal, [row(goal, "eager", "cuda")], nobody) == "not measured (sdpa, flex)"
    assert judged(goal, [sdpa, flex], backend="triton") == "not measured"
    assert tables.judgement(goal, "cuda", None) == "not measured"


def test_other_measures():
    attention = Attention(512, 50, padded=False)
    copy = DeviceGoal("masked_attention", attention, COPY_SHARE, 0.8, mode=FORWARD)
    # 4 · 512 · 50 · 12 · 64 · 2 bytes = 157 MB; at 4000 GB/s 0.0393 ms.
    assert judged(copy, [row(copy, "sdpa", "cuda", ours_ms=0.0393)]) == "100%: yes"
    assert judged(copy, [row(copy, "sdpa", "cuda", ours_ms=0.0500)]) == "79%: **no**"
    gemm = DeviceGoal("token_patch_similarity", Similarity(2, 3, 4, 5), GEMM_SHARE, 0.6)
    assert judged(gemm, [row(gemm, "eager", "cuda")]) == "50%: **no**"
    extra = DeviceGoal("memory_attention", Memory(2, 5, 2, 8, 40, 4), EXTRA_BYTES, 2e6)
    assert judged(extra, [row(extra, "eager", "cuda")]) == "2 MB: yes"
    assert judged(extra, [row(extra, "eager", "cuda", ours_peak_bytes=2e6 + 1)]).endswith("**no**")
    beside = DeviceGoal("masked_attention", SMALL, RATIO, 1.5, ("triton",), backends=("cuda",))
    ours = row(beside, "sdpa", "cuda", ours_ms=2.0)
    assert judged(beside, [ours]) == "not measured"
    assert judged(beside, [ours, row(beside, "sdpa", "triton", ours_ms=3.0)]) == "1.50 ×: yes"


def test_nothing_measured_is_said_of_every_goal(tmp_path):
    (table,) = tables.tables(tables.read(tmp_path))
    assert len(table.rows) == len(DEVICE_GOALS)
    for line in table.rows:
        assert all(cell in ("not measured", "—") for cell in line[-2:])
        assert "not measured" in line


def test_times_and_absences(tmp_path, capsys):
    (goal, *_) = DEVICE_GOALS
    measured = {"machine": MACHINE, "absent": [refusal(goal, "flex")]}
    measured["rows"] = [row(goal, "sdpa", "cuda", ours_ms=0.5), row(goal, "eager", "cuda")]
    timings.write_results(tmp_path, goal.operator, measured)
    _, times, absences = tables.tables(tables.read(tmp_path / "some-gpu"))
    ((operator, shape, mode, cuda, triton, baselines),) = times.rows
    assert (operator, shape, mode) == (f"`{goal.operator}`", str(goal.shape), goal.mode)
    assert (cuda, triton) == ("0.5 (2)", "not measured")
    assert baselines == "sdpa 1 (2) · eager 1 (2)"
    (line,) = absences.rows
    assert line[-3:] == ("cuda", "flex", "RefusalError: not installed")
    assert tables.main([str(tmp_path / "some-gpu")]) == 0
    printed = capsys.readouterr().out
    assert f"| `{goal.operator}` | {goal.shape} | {goal.mode} | 0.5 (2) | not measured |" in printed


# ---- what asks the GPU itself, on a machine that plays one ---------------------------------------


class Event:
    """As torch.cuda.Event, by the wall."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Nothing:
    """A stream or a graph that does nothing."""

    def wait_stream(self, other):
        pass

    def replay(self):
        pass


@pytest.fixture
def played_gpu(monkeypatch):
    properties = argparse.Namespace(major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "FLUSHED_BYTES", 2**16)
    monkeypatch.setattr(device, "COPIED_BYTES", 2**20)
    monkeypatch.setitem(device.GEMM_SIDE, "cuda", 32)


def test_the_clock_and_the_rates(played_gpu):
    clock = device.GpuClock()
    assert 0.01 <= clock(lambda: time.sleep(0.01), flushes=3) < 0.2
    clock._flush_seconds = 0.01
    # What the CPU takes to launch, twice over, and one flush more: at least 2 · 0.05 / 0.01 + 1.
    assert 11 <= clock.flushes(lambda: time.sleep(0.05)) <= device.MOST_FLUSHES
    assert clock.flushes(lambda: time.sleep(1)) == device.MOST_FLUSHES
    found = device.rates(clock)
    assert found["copy_gb_per_second"] > 0
    assert set(found["gemm_gflops"]) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in found["gemm_gflops"].values())


def test_the_machine_is_described_as_by_the_suite_and_further(played_gpu):
    found = device.describe_gpu()
    assert set(describe("cpu")) <= set(found)
    assert (found["device"], found["capability"], found["memory_gb"]) == ("Some GPU", "sm_90", 80.0)
    assert found["packages"]["flash-maxsim"] == "not installed"


def test_a_captured_graph_gives_the_same_bits(played_gpu):
    problem = calls.SMALL[2].problem("bfloat16", "cpu", "cpu")
    assert repeatability.same_in_a_graph(problem)
    runs = iter([1.0, 1.0, 2.0, 1.0, 2.0, 2.0])
    for _ in range(2):  # in the graph, then on the other stream
        assert not repeatability.same_in_a_graph(lambda: [torch.tensor([next(runs)])])
