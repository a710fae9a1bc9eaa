"""The README's tables are those of the committed results, and say what the rows say."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.goals import GOALS
from benchmarks.shapes import TRAINING

MACHINE = {
    "device": "Some CPU, 2 threads",
    "threads": 2,
    "cpu_capability": "AVX2",
    "torch": "2.13.0+cpu",
    "date": "2026-01-02",
    "commit": "0123456789ab",
    "gemm_gflops": {"float32": 200.0, "bfloat16": 100.0},
}
ROW = {
    "operator": "token_patch_similarity",
    "backend": "cpu",
    "shape": "B32 T64 P49 D128",
    "dtype": "float32",
    "mode": TRAINING,
    "baseline": "field",
    "sizes": {},
    "ratio": 2.5,
    "ratio_p20": 2.4,
    "ratio_p80": 2.6,
    "ours_done_gflop": 0.5,  # 2.5 ms at 200 GFLOP/s
}
SET_OF = {dtype: name for name, dtype in report.GOAL_SETS.items()}
for _name, _ms in (("ours", 4.0), ("baseline", 10.0)):
    ROW |= {f"{_name}_ms": _ms, f"{_name}_gflops": 400 / _ms}
    ROW |= {f"{_name}_peak_bytes": int(_ms * 1e6)}


def results(folder, rows, shape_set="quick"):
    """Rows as the suite writes them."""
    for row in rows:
        path = folder / "some-cpu-2-threads" / f"{row['operator']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        sets = json.loads(path.read_text())["sets"] if path.exists() else {}
        sets.setdefault(shape_set, {"machine": MACHINE, "rows": []})["rows"].append(row)
        path.write_text(json.dumps({"operator": row["operator"], "sets": sets}))
    return report.read_results(folder)


def line_of(text, *words):
    (line,) = (line for line in text.splitlines() if all(word in line for word in words))
    return line


def test_the_readme_shows_the_committed_results():
    expected = report.markdown(report.read_results())
    shown = report.between_markers(report.README.read_text())
    assert shown == expected, "run `python -m benchmarks.report --write`"


def test_a_goal_that_is_reached_and_one_that_is_not(tmp_path):
    text = report.markdown(results(tmp_path, [ROW]))
    line = line_of(text, "B32 T64 P49 D128", "**field**")
    assert "≥ 2.5 × | yes | 2.50 × [2.40, 2.60] | 4.00 × | 100 (50%) · 40 (20%) | 4 · 10 |" in line
    assert "Some CPU, 2 threads" in text and "200 GFLOP/s in float32" in text
    # Not what rounds to the goal: what reaches it.
    text = report.markdown(results(tmp_path / "slow", [ROW | {"ratio": 2.499}]))
    assert "| **no** | 2.50 ×" in line_of(text, "B32 T64 P49 D128", "**field**")


@pytest.mark.parametrize(("dtype", "share"), [("float32", "50%"), ("bfloat16", "10%")])
def test_a_share_is_of_the_rate_that_the_dtype_can_have(tmp_path, monkeypatch, dtype, share):
    """float32 cannot go at the rate of bfloat16 on a processor that is faster there."""
    rates = {"float32": 200.0, "bfloat16": 1000.0}
    monkeypatch.setitem(MACHINE, "gemm_gflops", rates)
    text = report.markdown(results(tmp_path, [ROW | {"dtype": dtype}], SET_OF[dtype]))
    assert f"| 100 ({share}) · 40" in line_of(text, "B32 T64 P49 D128", "**field**")


def test_the_ratio_is_to_the_fastest_baseline(tmp_path):
    shape = "B32 S50 H12 D64 padded"
    sdpa = ROW | {"operator": "masked_attention", "shape": shape, "ratio": 1.2, "baseline": "sdpa"}
    eager = sdpa | {"baseline": "eager", "ratio": 1.9}
    text = report.markdown(results(tmp_path, [sdpa, eager]))
    assert "| **sdpa** · eager | ≥ 1.3 × | **no** | 1.20 ×" in line_of(text, f"| {shape} |")
    # With one of the baselines missing, nobody knows which is the fastest.
    text = report.markdown(results(tmp_path / "one", [eager]))
    assert "| sdpa · eager | ≥ 1.3 × |  | not measured |" in line_of(text, f"| {shape} |")


def test_a_comparison_without_a_goal(tmp_path):
    (goal,) = (goal for goal in GOALS if goal.at_least is None)
    row = ROW | {"operator": goal.operator, "shape": str(goal.shape), "baseline": goal.against[0]}
    text = report.markdown(results(tmp_path, [row]))
    assert f"| **{goal.against[0]}** | — |  | 2.50 ×" in text


def test_what_was_not_measured_is_shown_as_such(tmp_path):
    text = report.markdown(report.read_results(tmp_path))
    assert text.count("| not measured |") == len(GOALS)
    text = report.markdown(results(tmp_path, [ROW]))
    assert text.count("| not measured |") == len(GOALS) - 1


def test_slower_than_eager_is_said(tmp_path):
    fast = ROW | {"baseline": "eager", "ratio": 1.5}
    slow = ROW | {"baseline": "eager_indexed", "ratio": 0.9, "shape": "slow shape"}
    text = report.markdown(results(tmp_path, [fast, slow, ROW | {"ratio": 0.1}], "sweep"))
    line = line_of(text, "Against eager")
    assert "2 comparisons (sets sweep): slower in 1" in line
    assert "0.90 ×" in line and "slow shape" in line


def test_the_training_step_is_in_pairs_a_second(tmp_path):
    step = copy.deepcopy(ROW) | {"operator": "training_step", "shape": "tiny B64"}
    step |= {"baseline": "reference", "sizes": {"batch": 64}}
    step |= {name: None for name in step if name.endswith(("gflops", "gflop", "bytes"))}
    text = report.markdown(results(tmp_path, [step], "model"))
    assert "| tiny B64 | 1.6e+04 | 6.4e+03 | 2.50 ×" in line_of(text, "tiny B64")


def test_writing_replaces_what_is_between_the_markers(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    rows = results(tmp_path / "results", [ROW])
    monkeypatch.setattr(report, "read_results", lambda: rows)
    assert report.main([]) == 0
    printed = capsys.readouterr().out
    assert readme.read_text().count("stale") == 1
    assert report.main(["--write"]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert "stale" not in text and "2.50 ×" in report.between_markers(text)
    assert "2.50 ×" in printed


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}\n{report.BEGIN}\n"])
def test_a_missing_marker_is_named(text):
    with pytest.raises(ValueError, match="benchmarks: begin"):
        report.between_markers(text)


def test_results_lie_where_the_suite_writes_them():
    for path in report.RESULTS.glob("*/*.json"):
        assert json.loads(path.read_text())["operator"] == Path(path).stem
