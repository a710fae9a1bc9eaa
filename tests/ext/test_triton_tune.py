"""The search of launch tables, with a table, calls and times of the tests' own."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
from triton.errors import TritonError

from mpma_ext.kernels import launch, tune

FOLDER = Path(launch.__file__).parent
STEMS = [path.stem for path in sorted(FOLDER.glob("*.json"))]
ROW = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def rows(monkeypatch):
    """The only table: one kernel, a row for sm86, whose turn a CPU tensor is."""
    made = {"_kernel": {"sm86": {"float32": {"any": dict(ROW)}}}}
    monkeypatch.setattr(launch, "table", lambda stem: made)
    monkeypatch.setattr(tune, "table", lambda stem: made)
    return made["_kernel"]["sm86"]["float32"]


def call():
    """Gives its launch, which `measure` turns into a time, and a result that does not vary."""
    call.launch = launch.launch("stem", "_kernel", torch.ones(1), "any")
    return [torch.ones(3)]


def measure(of):
    """Least at blocks of 256 rows, 8 warps and 2 stages."""
    of()
    row = call.launch
    return 1 + abs(row["BLOCK_M"] - 256) + abs(row["num_warps"] - 8) + abs(row["num_stages"] - 2)


def test_the_fastest_launch_is_found(rows):
    assert tune.tune(call, measure) == {"stem"}
    assert rows["any"] == {"BLOCK_M": 256, "num_warps": 8, "num_stages": 2}


def test_what_is_as_fast_changes_nothing(rows):
    assert tune.tune(call, lambda of: 1.0) == set()
    assert rows["any"] == ROW


def test_what_cannot_run_or_is_wrong_is_said_and_not_taken(rows):
    def partly():
        results = call()
        if call.launch["BLOCK_M"] > 128:
            raise TritonError("out of shared memory")
        return [torch.zeros(3)] if call.launch["num_warps"] > 4 else results

    said = []
    assert tune.tune(partly, measure, said.append) == {"stem"}
    assert rows["any"] == ROW | {"BLOCK_M": 128}
    assert any("out of shared memory" in line for line in said)
    assert any("result 0 differs by 1" in line for line in said)


def test_a_generation_gets_rows_of_its_own(rows, monkeypatch):
    monkeypatch.setattr(launch, "generation", lambda device: "sm90")
    assert tune.tune(call, lambda of: 1.0) == set()
    assert launch.table("stem") == {"_kernel": {"sm86": {"float32": {"any": ROW}}}}
    tune.tune(call, measure)
    assert launch.table("stem")["_kernel"]["sm90"]["float32"]["any"]["BLOCK_M"] == 256
    assert rows["any"] == ROW


def test_float16_takes_the_rows_of_bfloat16_that_it_lacks():
    own, borrowed = {"BLOCK_M": 16}, {"BLOCK_M": 32}
    of = {"sm90": {"float16": {"a": own}, "bfloat16": {"a": {}, "b": borrowed}}, "sm86": {}}
    assert launch.find(of, "sm90", "float16", "a") is own
    assert launch.find(of, "sm100", "float16", "b") is borrowed


@pytest.mark.parametrize("stem", STEMS)
def test_tables_are_written_as_they_are(stem):
    assert tune.text_of(launch.table(stem)) == (FOLDER / f"{stem}.json").read_text()


def test_a_machine_without_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["masked_attention", "2", "8", "2", "16"]) == 2
    assert "no GPU" in capsys.readouterr().err
