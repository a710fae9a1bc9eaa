"""The command, and what it says to directories and splits that do not fit."""

import argparse
import json
import shutil

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from mpma_train.evaluate import TASKS, add_arguments, run
from mpma_train.evaluate.features import load_model, load_subject
from mpma_train.evaluate.results import Result


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("task", TASKS)
def test_command_prints_a_table_and_writes_its_file(task, tmp_path, model_path, store_path, capsys):
    model = shutil.copytree(model_path, tmp_path / "model")
    assert run(parse(task, "--model", str(model), "--data", str(store_path))) == 0
    result = Result.load(model / "eval" / f"{task}.json")
    assert result.task == task
    assert result.n > 0
    printed = capsys.readouterr().out
    first, value = next(iter(result.metrics.items()))
    assert first in printed
    assert f"{value:.3f}" in printed


def test_tasks_have_their_own_settings():
    common = ("--model", "m", "--data", "d")
    assert parse("retrieval", *common, "--score", "local").score == "local"
    assert parse("reconstruct", *common).draws == 4
    with pytest.raises(SystemExit):
        parse("linear", *common, "--score", "local")
    with pytest.raises(SystemExit):
        parse("retrieval", *common, "--score", "none")


def test_empty_and_unknown_splits_name_what_there_is(tmp_path, model_path, make_store):
    data = make_store(tmp_path / "store")
    pairs = pd.read_parquet(data / "pairs.parquet")
    pairs.loc[pairs["split"] == "test", "split"] = "validate"
    pairs.to_parquet(data / "pairs.parquet")
    for task in TASKS:
        with pytest.raises(ValueError, match=r"got 'test'; the store has .*'validate': 36"):
            run(parse(task, "--model", str(model_path), "--data", str(data)))
    with pytest.raises(ValueError, match=r"split must be one of .* got 'dev'"):
        run(parse("retrieval", "--model", str(model_path), "--data", str(data), "--split", "dev"))


def test_store_of_another_size_is_refused(tmp_path, save_model, store_path):
    path = save_model(tmp_path / "m", image_size=16)
    with pytest.raises(ValueError, match=r"expected images of side 32 .* was made for 64"):
        load_subject(str(path), str(store_path), batch_size=2, seed=0)


def test_batch_size_is_checked(model_path, store_path):
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        load_subject(str(model_path), str(store_path), batch_size=0, seed=0)


def test_directories_without_a_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: no such directory: .*nowhere"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"its config\.json is missing"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its config\.json is no JSON file"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="has model_type 'bert'"):
        load_model(str(tmp_path))


def test_missing_weights_are_named(tmp_path, model_path):
    path = shutil.copytree(model_path, tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("memory"))
    del weights[gone]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks fitting weights for {gone}"):
        load_model(str(path))
