import dataclasses
from pathlib import Path

import pytest
import yaml

from mpma_train.models import MpmaConfig
from mpma_train.settings import (
    MpmaTrainingArguments,
    changed_settings,
    parse_settings,
    save_settings,
)

CONFIGS = Path(__file__).parents[2] / "mpma_train" / "configs"


@pytest.fixture
def write(tmp_path):
    def write(**settings):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def test_yaml_gives_defaults_and_the_command_line_wins(write):
    config = write(learning_rate=0.01, fusion="gap_add", augment=True, max_length=64, bf16=False)
    settings = parse_settings(
        [config, "--learning_rate", "2e-3", "--fusion=kv_concat", "--max-length", "32", "--bf16"]
    )
    assert settings.training == {"learning_rate": 0.002, "bf16": True}
    assert settings.model == {"fusion": "kv_concat"}
    assert settings.data.augment is True and settings.data.max_length == 32


def test_a_setting_that_is_false_on_the_command_line_wins_over_yaml(write):
    settings = parse_settings([write(augment=True, global_alignment=True), "--augment", "false"])
    assert settings.data.augment is False
    settings = parse_settings([write(global_alignment=True), "--global_alignment", "false"])
    assert settings.model == {"global_alignment": False}


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-3\nadam_epsilon: 1e-8\nmax_steps: -1\nfusion_dropout: 0\n")
    settings = parse_settings([str(path)])
    assert settings.training == {"learning_rate": 1e-3, "adam_epsilon": 1e-8, "max_steps": -1}
    assert MpmaConfig(**settings.model).fusion_dropout == 0


def test_defaults_of_pretraining():
    fields = {f.name: f.default for f in dataclasses.fields(MpmaTrainingArguments)}
    assert (fields["adam_beta1"], fields["adam_beta2"]) == (0.9, 0.95)
    assert fields["lr_scheduler_type"] == "cosine"
    assert fields["logging_nan_inf_filter"] is False
    assert fields["dataloader_drop_last"] is True


@pytest.mark.parametrize("name", ["tiny", "mpma_base", "mrm"])
def test_presets_name_only_settings_that_exist(name):
    settings = parse_settings([str(CONFIGS / f"{name}.yaml"), "--use_cpu", "--bf16", "false"])
    config = MpmaConfig(**settings.model)
    args = settings.training_arguments()
    assert settings.data.max_length <= config.max_position_embeddings
    assert args.output_dir == f"runs/{name}"
    assert args.get_warmup_steps(1000) in (80, 100, 200)


def test_saved_settings_give_the_same_run(write, tmp_path):
    config = write(
        image_size=64,
        patch_size=8,
        fusion="cross_attention",
        augment=True,
        text_learning_rate=1e-5,
        lr_scheduler_kwargs={"num_cycles": 0.4},
        output_dir="x",
        use_cpu=True,
    )
    first = parse_settings([config, "--seed", "7", "--resume_from_checkpoint", "true"])
    values = first.effective(MpmaConfig(**first.model))
    save_settings(values, tmp_path / "settings.yaml")
    assert changed_settings(values, tmp_path / "settings.yaml") == []
    other = values | {"seed": 8, "augment": False}
    changes = ["augment: True -> False", "seed: 7 -> 8"]
    assert changed_settings(other, tmp_path / "settings.yaml") == changes
    second = parse_settings([str(tmp_path / "settings.yaml")])
    assert second.data == first.data
    assert MpmaConfig(**second.model).to_dict() == MpmaConfig(**first.model).to_dict()
    one, two = (s.training_arguments().to_dict() for s in (first, second))
    # How a run was started again is no property of the run.
    assert one.pop("resume_from_checkpoint") == "true"
    assert two.pop("resume_from_checkpoint") is None
    assert one == two and one["lr_scheduler_kwargs"] == {"num_cycles": 0.4}


@pytest.mark.parametrize(
    ("settings", "argv", "message"),
    [
        ({"image_sizes": 64}, [], r"config.yaml: unknown setting 'image_sizes'; .* 'image_size'"),
        ({}, ["--learnin_rate", "1"], "unknown setting '--learnin_rate'; .* 'learning_rate'"),
        ({}, ["--shuffle-sentence"], "unknown setting '--shuffle-sentence'; .*'shuffle_sentences'"),
        ({"vocab_size": 5}, [], "unknown setting 'vocab_size'"),
        ({"hidden_size": "wide"}, [], "config.yaml: hidden_size: invalid int value: 'wide'"),
        ({"hidden_size": 64.5}, [], "config.yaml: hidden_size: invalid int value: '64.5'"),
        ({"learning_rate": True}, [], "config.yaml: learning_rate: invalid float value: 'true'"),
        ({"learning_rate": [1]}, [], r"config.yaml: learning_rate: invalid float .*\[1\]"),
        ({"augment": "often"}, [], "config.yaml: augment: Truthy value expected: got often"),
        ({}, ["--max_steps", "many"], "max_steps: invalid int value: 'many'"),
        ({}, ["--fusion", "glue"], "fusion: invalid choice: 'glue' .*memory"),
        ({}, ["--max_steps"], "max_steps: expected one argument"),
    ],
)
def test_bad_settings_name_themselves(write, settings, argv, message):
    with pytest.raises(ValueError, match=message):
        parse_settings([write(**settings), *argv])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "3\n", "1: 2\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml: (not readable as YAML|expected a mapping)"):
        parse_settings([str(path)])


def test_missing_file_and_missing_argument():
    with pytest.raises(FileNotFoundError, match=r"config: no such file: nowhere\.yaml"):
        parse_settings(["nowhere.yaml"])
    with pytest.raises(ValueError, match="config"):
        parse_settings([])


@pytest.mark.parametrize(
    "name", ["logging_nan_inf_filter", "dataloader_persistent_workers", "ignore_data_skip"]
)
def test_settings_that_would_break_a_run_are_refused(write, name):
    config = write(output_dir="x", use_cpu=True, dataloader_num_workers=1)
    settings = parse_settings([config, f"--{name}", "true"])
    with pytest.raises(ValueError, match=f"{name}: true is refused"):
        settings.training_arguments()


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", -1.0), ("per_device_train_batch_size", 0)]
)
def test_training_settings_below_their_least_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected at least \d, got {value}"):
        MpmaTrainingArguments(output_dir=str(tmp_path), **{name: value})
