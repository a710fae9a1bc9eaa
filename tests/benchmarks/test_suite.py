"""The suite as a command, on shapes that take seconds."""

import json
import os
import subprocess
import sys

import pytest

import mpma_train
from benchmarks.machine import ROOT, cpu_name, slug
from benchmarks.sets import SETS
from benchmarks.shapes import TRAINING
from mpma_train import cli

FIELDS = {"operator", "shape", "sizes", "dtype", "mode", "baseline", "backend", "pairs"}
FIELDS |= {"ratio", "ratio_p20", "ratio_p80", "ours_done_gflop"}
FIELDS |= {
    f"{name}_{figure}"
    for name in ("ours", "baseline")
    for figure in ("ms", "ms_p20", "ms_p80", "gflops", "peak_bytes")
}
MACHINE = {"device", "threads", "cpu_capability", "torch", "date", "commit", "gemm_gflops"}


def run_suite(*arguments):
    # Nothing of the pytest that runs this: a worker of xdist would switch benchmarks off.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = outside | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "--threads", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_everything_is_measured_written_and_printed(tmp_path):
    done = run_suite("--shapes", "smoke", "--seconds", "0.01", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-1-thread")
    measured = []
    for path in folder.iterdir():
        content = json.loads(path.read_text())
        assert content["operator"] == path.stem and set(content["sets"]) == {"smoke"}
        of_set = content["sets"]["smoke"]
        assert set(of_set["machine"]) == MACHINE
        assert all(rate > 0 for rate in of_set["machine"]["gemm_gflops"].values())
        measured += of_set["rows"]
    assert len(measured) == len(list(SETS["smoke"]()))
    for row in measured:
        assert set(row) == FIELDS
        assert 0 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert 0 < row["ours_ms"] and row["pairs"] >= 5
        assert row["operator"] == "training_step" or row["ours_gflops"] > 0
    assert "training_step" in done.stdout and "memory_attention" in done.stdout


def test_one_operator_keeps_the_other_sets_of_its_file(tmp_path):
    path = tmp_path / slug(f"{cpu_name()}, 1 thread") / "memory_attention.json"
    path.parent.mkdir()
    kept = {"machine": {"device": "kept"}, "rows": []}
    path.write_text(json.dumps({"operator": path.stem, "sets": {"quick": kept, "smoke": kept}}))
    arguments = ("--shapes", "smoke", "--operator", path.stem, "--seconds", "0.01")
    chosen = f"dense and {TRAINING} and sdpa_expanded"
    assert run_suite(*arguments, "--results", str(tmp_path), "-k", chosen).returncode == 0
    sets = json.loads(path.read_text())["sets"]
    assert sets["quick"] == kept
    assert [row["baseline"] for row in sets["smoke"]["rows"]] == ["sdpa_expanded"]


def test_an_operator_without_a_case_is_an_error():
    done = run_suite("--shapes", "quick", "--operator", "training_step")
    assert done.returncode == 2 and "training_step" in done.stderr


def test_the_command_runs_the_suite_with_the_same_arguments(monkeypatch):
    calls = []

    def record(command, cwd):
        calls.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", record)
    assert cli.main(["bench", "--shapes", "model", "-k", "sdpa"]) == 3
    assert calls == [(["-m", "benchmarks", "--shapes", "model", "-k", "sdpa"], ROOT)]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_needs_a_checkout(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(mpma_train, "__file__", str(tmp_path / "mpma_train" / "__init__.py"))
    assert cli.main(["bench", *arguments]) == 2
    assert str(tmp_path) in capsys.readouterr().err
