"""The result file and the tables."""

import json

import pytest
from rich.console import Console

from mpma_train.evaluate.results import Result
from mpma_train.evaluate.summary import main


def example(model, **changes):
    values = {
        "task": "retrieval",
        "model": str(model),
        "data": "store",
        "n": 3,
        "seed": 0,
        "metrics": {"i2r_r@1": 0.5, "class_p@5": None, "auroc_100/Edema": 0.123},
        "baselines": {"chance": {"i2r_r@1": 0.25}},
        "intervals": {"i2r_r@1": [0.4, 0.6]},
        "details": {"duplicate reports": 1, "left out": []},
    }
    return Result(**(values | changes))


def test_file_holds_the_agreed_fields_and_comes_back(tmp_path):
    result = example(tmp_path)
    path = result.save()
    assert path == tmp_path / "eval" / "retrieval.json"
    stored = json.loads(path.read_text())
    assert {"task", "model", "data", "n", "seed", "metrics", "baselines"} <= set(stored)
    assert stored["metrics"]["class_p@5"] is None
    assert Result.load(path) == result


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="retrieval: a result is NaN"):
        example(tmp_path, metrics={"i2r_r@1": float("nan")}).save()
    assert not (tmp_path / "eval" / "retrieval.json").exists()


def test_unreadable_results_name_the_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON result"):
        Result.load(path)
    path.write_text('{"task": "linear"}')
    with pytest.raises(ValueError, match=r"expected the fields .* got \['task'\]"):
        Result.load(path)


def test_table_shows_every_metric_beside_its_baselines(tmp_path):
    console = Console(width=120, record=True)
    result = example(tmp_path)
    console.print(result.table())
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "i2r_r@1" in line)
    assert [c.strip() for c in row.strip("│").split("│")] == [
        "i2r_r@1",
        "0.500",
        "0.400–0.600",
        "0.250",
    ]
    assert "–" in next(line for line in lines if "class_p@5" in line)
    assert result.caption() == "store · n 3 · seed 0 · duplicate reports 1 · left out none"


def test_summary_prints_all_tasks_without_labels_and_deviations(tmp_path, capsys):
    example(tmp_path).save()
    areas = {"auroc_1": 0.75, "auroc_1_std": 0.01}
    example(tmp_path, task="linear", metrics=areas, baselines={}).save()
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "chance 0.250" in printed
    assert "0.400–0.600" in printed
    assert "retrieval: store · n 3 · seed 0 · duplicate reports 1" in printed
    assert "0.750" in printed
    assert "Edema" not in printed
    assert "_std" not in printed


def test_summary_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected results in its folder eval"):
        main([str(tmp_path)])
