"""`make gpu` as a sequence of processes, played by small programs: time, failures, what is kept."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, sanitizer, steps
from benchmarks.gpu.steps import FAILED, OUT_OF_TIME, PASSED, SKIPPED, Outcome, Step

WRITE = """
import sys
from pathlib import Path
from benchmarks.gpu.steps import write_report
report = Path(sys.argv[1])
"""


@pytest.fixture
def programs(monkeypatch):
    """Programs by the name of the step that they play; each is given the report's path."""
    played = {}
    monkeypatch.setattr(
        steps,
        "command",
        lambda step, report: [sys.executable, "-c", played[step.name], str(report)],
    )
    monkeypatch.setattr(steps, "GRACE", 1)
    return played


def play(programs, seconds=20, **of_step):
    """Outcomes by step."""
    programs |= of_step
    every = [Step("correctness", name, 1, ()) for name in of_step]
    seen = []
    outcomes = steps.run_all(every, seconds, lambda step, outcome: seen.append((step, outcome)))
    assert seen == list(zip(every, outcomes, strict=True))
    return dict(zip(of_step, outcomes, strict=True))


def test_what_fails_is_recorded_and_the_next_one_goes_on(programs, capsys):
    found = play(
        programs,
        wrong="raise SystemExit(3)",
        crashed="import os; os.abort()",
        skipped=WRITE + "write_report(report, None, 'no tool'); sys.exit(77)",
        right=WRITE + "write_report(report, [1, 2])",
        chatty="for n in range(999): print('line', n)\nraise SystemExit('the end')",
    )
    assert found["wrong"].status == found["crashed"].status == FAILED
    assert found["wrong"].reason == "exit status 3" and found["crashed"].reason == "exit status -6"
    assert (found["skipped"].status, found["skipped"].reason) == (SKIPPED, "no tool")
    assert (found["right"].status, found["right"].details) == (PASSED, [1, 2])
    assert found["chatty"].output[-2:] == ["line 998", "the end"]
    assert len(found["chatty"].output) == steps.LINES
    assert "line 0\nline 1\n" in capsys.readouterr().out


def test_a_step_that_takes_too_long_says_what_it_knows(programs):
    polite = (
        WRITE
        + """
import time
write_report(report, "half of it")
try:
    time.sleep(60)
except KeyboardInterrupt:
    write_report(report, "all that is known", "not done")
"""
    )
    deaf = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(60)
"""
    start = time.monotonic()
    found = play(programs, seconds=8, polite=polite, deaf=deaf, late="")
    assert time.monotonic() - start < 20  # 8 seconds and a second of grace, on a busy machine
    assert [outcome.status for outcome in found.values()][:2] == [OUT_OF_TIME] * 2
    assert found["polite"].details == "all that is known"
    assert found["polite"].reason.startswith("not done, stopped after")


def test_nothing_starts_when_the_time_is_over(programs):
    found = play(programs, seconds=-1, late="raise SystemExit(3)")
    assert found["late"].status == OUT_OF_TIME and "time limit" in found["late"].reason


def test_what_a_step_started_ends_with_it(programs, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert play(programs, parent=program)["parent"].status == PASSED
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


def test_time_that_is_left_over_goes_to_the_later_steps(monkeypatch):
    shares = []

    def run(step, seconds):
        shares.append(seconds)
        return Outcome(PASSED, 0.0)

    monkeypatch.setattr(steps, "run", run)
    every = [Step("timings", name, weight, ()) for name, weight in (("a", 1), ("b", 2), ("c", 1))]
    steps.run_all(every, 100, lambda step, outcome: None)
    assert shares == pytest.approx([25, 100 * 2 / 3, 100], abs=1)


def test_the_steps_of_a_run():
    options = ("--seconds", "0.5")
    every = list(steps.steps(steps.STAGES, ["cuda", "triton"], list(steps.TIMINGS), options))
    assert [step.stage for step in every] == [
        *("correctness",) * 2,
        *("sanitizer",) * 2,
        *("repeatability",) * 2,
        *("timings",) * 5,
    ]
    report = Path("report.json")
    assert steps.command(every[1], report) == [
        *(sys.executable, "-m", "benchmarks.gpu.correctness"),
        *("--backend", "triton", "--report", "report.json"),
    ]
    assert steps.command(every[-1], report) == [
        *(sys.executable, "-m", "benchmarks.gpu.timings"),
        *("--operator", "token_patch_max_similarity", "--backend", "cuda", "triton"),
        *(*options, "--report", "report.json"),
    ]
    some = list(steps.steps(["timings"], ["cuda"], ["memory_attention"], ()))
    assert [(step.stage, step.name) for step in some] == [("timings", "memory_attention")]


def test_every_step_s_arguments_are_understood(monkeypatch, tmp_path):
    """Each stage's parser takes the command line that `steps` makes of it."""

    parse = argparse.ArgumentParser.parse_args

    def understand(parser, argv):
        raise SystemExit(str(parse(parser, argv)))  # no further

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understand)
    options = ("--seconds", "0.5", "--results", str(tmp_path))
    for step in steps.steps(steps.STAGES, ["cuda"], ["memory_attention"], options):
        module = importlib.import_module(f"benchmarks.gpu.{step.stage}")
        with pytest.raises(SystemExit, match="cuda"):
            module.main(steps.command(step, tmp_path / "report.json")[3:])


def test_checks_are_kept_beside_those_of_other_backends(tmp_path):
    step = Step("sanitizer", "cuda", 1, ())
    steps.write_checks(tmp_path, {"device": "a"}, step, Outcome(PASSED, 1.0, details={"x": 1}))
    other = Step("sanitizer", "triton", 1, ())
    steps.write_checks(tmp_path, {"device": "b"}, other, Outcome(FAILED, 2.0, "wrong"))
    steps.write_checks(tmp_path, {"device": "c"}, step, Outcome(SKIPPED, 0.0, "no tool"))
    written = json.loads((tmp_path / "checks" / "sanitizer.json").read_text())
    assert written["stage"] == "sanitizer"
    assert {name: of["status"] for name, of in written["steps"].items()} == {
        "cuda": SKIPPED,
        "triton": FAILED,
    }
    assert written["steps"]["cuda"]["machine"] == {"device": "c"}


# ---- the whole command --------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """What the command asks of the machine; outcomes by step are played."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "available_backends", lambda: ["cuda", "reference"])
    monkeypatch.setattr(command, "describe_gpu", lambda: {"device": "Some GPU"})
    played = {}
    monkeypatch.setattr(
        steps, "run", lambda step, seconds: played.get(step.stage, Outcome(PASSED, 1.0))
    )
    return played


def test_the_command_writes_and_prints(a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    a_gpu["sanitizer"] = Outcome(SKIPPED, 0.1, "compute-sanitizer is not installed")
    assert command.main([]) == 0
    assert {path.name for path in (tmp_path / "some-gpu" / "checks").iterdir()} == {
        f"{stage}.json" for stage in steps.STAGES
    }
    printed = capsys.readouterr().out
    assert "skipped: triton is not in this installation" in printed
    assert "sanitizer, cuda: skipped: compute-sanitizer is not installed" in printed
    assert "goals and what was reached" in printed and "not measured" in printed


@pytest.mark.parametrize("status", [FAILED, OUT_OF_TIME])
def test_the_exit_status_tells(a_gpu, tmp_path, status, capsys):
    a_gpu["correctness"] = Outcome(status, 1.0)
    some = ["--stage", "correctness", "sanitizer", "--out", str(tmp_path)]
    assert command.main(some) == 1
    written = tmp_path / "some-gpu" / "checks"
    assert {path.stem for path in written.iterdir()} == {"correctness", "sanitizer"}
    assert "goals" not in capsys.readouterr().out


def test_a_backend_that_is_not_there_is_an_error(a_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--backend", "triton", "--out", str(tmp_path)])
    assert "none of triton" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_command_says_that_there_is_no_gpu(capsys):
    with pytest.raises(SystemExit):
        command.main([])
    assert "no usable GPU" in capsys.readouterr().err


def test_the_command_says_that_the_kernels_cannot_be_imported(a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main([])
    assert "ln -s ../kernels mpma_ext/kernels" in capsys.readouterr().err


def test_nothing_is_imported_that_a_bare_machine_lacks():
    """Beside PyTorch the stages need numpy, rich, einops and pytest, all of them common."""
    optional = ["transformers", "pandas", "hypothesis", "accelerate", "sklearn", "timm"]
    optional += ["late_interaction_kernels", "flash_maxsim", "xdist", "pytest_benchmark"]
    program = f"import sys; sys.modules.update(dict.fromkeys({optional}))\n"
    stages = [f"benchmarks.gpu.{name}" for name in (*steps.STAGES, "calls", "__main__")]
    program += "import " + ", ".join(stages)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=steps.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- correctness and sanitizer ------------------------------------------------------------------


def run_of(folder, program):
    """The summary of a file of tests."""
    (folder / "test_some.py").write_text(program)
    junit = folder / "junit.xml"
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}")
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    subprocess.run(command, cwd=folder, capture_output=True)
    return correctness.summary(junit)


def test_failed_tests_are_named(tmp_path):
    found = run_of(
        tmp_path,
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'so wrong'\n"
        "import pytest\n"
        "def test_left_out(): pytest.skip('why')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no disk')\n"
        "def test_without_disk(broken): pass\n",
    )
    assert correctness.reason(found).startswith("2 of 4 tests failed, the first with: ")
    assert "so wrong" in correctness.reason(found) or "no disk" in correctness.reason(found)
    failed = found.pop("failed")
    assert found == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}
    broken, wrong = sorted(failed)
    assert broken.endswith("::test_without_disk") and wrong.endswith("::test_wrong")
    assert "no disk" in failed[broken] and "so wrong" in failed[wrong]


def test_the_reason_says_why_tests_cannot_be_imported(tmp_path):
    cause = "try: import no_such_kernels\nexcept ImportError as error:\n"
    cause += "    raise ImportError(f'the library cannot be loaded ({error})') from error\n"
    told = correctness.reason(run_of(tmp_path, cause))
    assert told == (
        "1 of 1 tests failed, the first with: ImportError: the library cannot be loaded "
        "(No module named 'no_such_kernels')"
    )
    assert correctness.reason(run_of(tmp_path, "def test_right(): pass")) == "0 of 1 tests failed"


def test_the_traps_are_there():
    assert all((steps.ROOT / path).is_file() for path in correctness.TRAPS)


def test_command_lines_of_the_sanitizer():
    assert list(sanitizer.TOOLS) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert sanitizer.command("memcheck", "cuda") == [
        *("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"),
        *("--padding", "64", "--error-exitcode", "86", "--target-processes", "application-only"),
        *(sys.executable, "-m", "benchmarks.gpu.calls", "--backend", "cuda"),
    ]
    assert sanitizer.environment()["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "...\n========= ERROR SUMMARY: 0 errors\n", "passed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", "failed"),
        (0, "nothing was said", "not checked"),
        (255, "========= Error: Device not supported.", "not checked"),
        (1, "========= ERROR SUMMARY: 0 errors", "not checked"),
    ],
)
def test_what_the_sanitizer_s_exit_status_means(code, output, status):
    found = sanitizer.verdict(code, output)
    assert found["status"] == status
    assert status == "passed" or found["output"].startswith(output.splitlines()[0][:20])


def sanitize(monkeypatch, tmp_path, program, calls="pass"):
    """Exit status and report of the stage, with a program in the tool's place."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport sys\n{program}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "PROGRAM", str(tool))
    monkeypatch.setattr(sanitizer, "calls", lambda backend: [sys.executable, "-c", calls])
    report = tmp_path / "report.json"
    status = sanitizer.main(["--backend", "cuda", "--report", str(report)])
    return status, json.loads(report.read_text())


def test_every_tool_has_to_find_nothing(monkeypatch, tmp_path):
    clean = "print('========= ERROR SUMMARY: 0 errors')"
    status, report = sanitize(monkeypatch, tmp_path, clean)
    assert status == 0 and report["reason"] == ""
    assert {found["status"] for found in report["details"].values()} == {"passed"}
    races = f"if sys.argv[2] == 'racecheck': sys.exit(print('========= Race') or 86)\n{clean}"
    status, report = sanitize(monkeypatch, tmp_path, races)
    assert status == 1 and report["reason"] == "racecheck failed"
    assert report["details"]["racecheck"]["output"] == "========= Race"
    assert report["details"]["memcheck"]["status"] == "passed"


def test_calls_that_fail_by_themselves_are_no_finding(monkeypatch, tmp_path):
    status, report = sanitize(monkeypatch, tmp_path, "", calls="raise SystemExit(1)")
    assert status == 1 and report["reason"] == "the calls fail by themselves"


def test_without_the_sanitizer_the_stage_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitizer, "PROGRAM", "no-such-sanitizer")
    report = tmp_path / "report.json"
    assert sanitizer.main(["--backend", "cuda", "--report", str(report)]) == steps.SKIP
    assert json.loads(report.read_text())["reason"] == "no-such-sanitizer is not installed"
