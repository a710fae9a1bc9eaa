import json
import shutil
import types

import numpy as np
import pytest
import torch
import transformers
import yaml
from train_runs import read_metrics, write_store

from mpma_train import cli, trainer
from mpma_train.callbacks import LOGGED
from mpma_train.data.store import Store
from mpma_train.models import MpmaForPreTraining, MpmaProcessor

PARTS = ("loss_image", "loss_report", "loss_global", "loss_local")


@pytest.fixture(scope="module")
def finished(store_path, config_path, tmp_path_factory):
    """A run of six steps over one epoch and a half, with evaluation, that ended well."""
    out = tmp_path_factory.mktemp("finished") / "run"
    argv = ["pretrain", str(config_path), "--data", str(store_path), "--output_dir", str(out)]
    argv += ["--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "3"]
    argv += ["--report_to", "tensorboard", "--logging_steps", "2", "--save_steps", "3"]
    assert cli.main(argv) == 0
    return out


def test_the_run_directory_is_a_model(finished):
    model = MpmaForPreTraining.from_pretrained(finished)
    processor = MpmaProcessor.from_pretrained(finished)
    batch = processor(images=torch.rand(1, 32, 32).numpy(), text=["left nodule"], max_length=8)
    assert model.get_image_features(batch["pixel_values"]).embeds.shape == (1, 16)
    assert model.config.vocab_size == len(processor.tokenizer)
    # The run's max_length, not max_position_embeddings: evaluations cut reports where it did.
    assert processor.tokenizer.model_max_length == 48
    assert {p.name for p in finished.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert list(finished.rglob("events.out.tfevents.*"))
    assert not list(finished.rglob("*.bin.index.json"))


def test_every_line_of_the_log_is_complete(finished):
    lines = [line for line in read_metrics(finished) if "loss" in line]
    # Every second step, and at the checkpoint of step 3: then no average crosses a checkpoint.
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    for line in lines:
        assert tuple(line) == LOGGED and None not in line.values()
        assert line["loss"] == pytest.approx(sum(line[name] for name in PARTS), rel=1e-5)
        assert line["pairs_per_second"] > 0 and line["peak_memory_mb"] > 10
        assert 0 <= line["data_wait"] <= 1 and 0 < line["memory_used_share"] <= 1


def test_evaluation_counts_neither_for_nor_against_throughput(pretrain_argv, tmp_path, monkeypatch):
    """By a clock that goes on by 1 s a fetch, 2 s a step and 100 s an evaluation."""
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def slow(owner, name, seconds):
        original = getattr(owner, name)

        def method(*args, **kwargs):
            clock.now += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    monkeypatch.setattr(trainer, "time", clock)
    slow(transformers.Trainer, "get_batch_samples", 1)
    slow(trainer.MpmaTrainer, "training_step", 2)
    slow(trainer.MpmaTrainer, "prediction_step", 100)
    argv = pretrain_argv("--max_steps", "3", "--logging_steps", "3", "--save_steps", "3")
    assert cli.main(["pretrain", *argv, "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    (line,) = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    # Three fetches and steps of 16 pairs. Of the evaluations, after steps 2 and 3, the first one
    # falls into the line's interval.
    assert clock.now == 3 * (1 + 2) + 2 * 100 and line["step"] == 3
    assert line["pairs_per_second"] == 48 / 9 and line["data_wait"] == 3 / 9


def test_validation_is_logged_by_its_parts(finished):
    lines = [line for line in read_metrics(finished) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        parts = sum(line[f"eval_{name}"] for name in PARTS)
        assert line["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_settings_and_card_are_saved(finished, store_path):
    settings = yaml.safe_load((finished / "settings.yaml").read_text())
    assert settings["max_steps"] == 6 and settings["memory_slots"] == 16
    assert settings["data"] == str(store_path) and settings["adam_beta2"] == 0.95
    card = (finished / "README.md").read_text()
    assert "0123abcd" in card and "72 training pairs of 64 studies" in card
    assert "must not be shared" in " ".join(card.split())


def test_parts_that_are_switched_off_are_null(pretrain_argv, tmp_path):
    argv = pretrain_argv("--fusion", "gap_add", "--global_alignment", "false", "--max_steps", "1")
    assert cli.main(["pretrain", *argv, "--local_alignment", "none"]) == 0
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss_global"] is None and line["loss_local"] is None
    assert line["memory_used_share"] is None and line["loss_report"] > 0


def test_accumulated_steps_equal_one_large_batch(pretrain_argv, tmp_path):
    """Holds for the image loss alone: alignment sees a micro-batch, reports differ in length."""
    only_image = ["--report_loss_weight", "0", "--global_alignment", "false"]
    only_image += ["--local_alignment", "none", "--text_dropout", "0", "--fusion_dropout", "0"]
    losses = {}
    for micro, steps in ((16, 1), (4, 4)):
        out = tmp_path / str(micro)
        argv = pretrain_argv(*only_image, "--max_steps", "4", out=out)
        argv += ["--per_device_train_batch_size", str(micro)]
        assert cli.main(["pretrain", *argv, "--gradient_accumulation_steps", str(steps)]) == 0
        losses[micro] = [(line["loss"], line["grad_norm"]) for line in read_metrics(out)]
    assert len(losses[16]) == 4
    for one, other in zip(losses[16], losses[4], strict=True):
        # Sums of 16 float32 terms in another order.
        assert one == pytest.approx(other, rel=1e-5)


class Poison(trainer.MpmaTrainer):
    """Makes the loss, or only one gradient, infinite or NaN at the third step."""

    where = "loss"

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step < 2:
            return loss
        if self.where == "loss":
            return loss * float("nan")
        next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        return loss


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_step_and_keeps_the_checkpoint(
    pretrain_argv, tmp_path, monkeypatch, capsys, where
):
    monkeypatch.setattr("mpma_train.pretrain.MpmaTrainer", Poison)
    monkeypatch.setattr(Poison, "where", where)
    argv = pretrain_argv("--save_steps", "1", "--save_total_limit", "1")
    assert cli.main(["pretrain", *argv]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mpma: error: step 3: loss ") and "not finite" in error
    run = tmp_path / "run"
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    kept = MpmaForPreTraining.from_pretrained(run / "checkpoint-2")
    assert all(torch.isfinite(p).all() for p in kept.parameters())
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert not (run / "model.safetensors").exists()


def test_text_encoder_has_its_own_learning_rate(pretrain_argv, monkeypatch):
    seen = {}

    class Spy(trainer.MpmaTrainer):
        def create_optimizer(self, model=None):
            seen["optimizer"] = super().create_optimizer(model)
            return seen["optimizer"]

    monkeypatch.setattr("mpma_train.pretrain.MpmaTrainer", Spy)
    argv = pretrain_argv("--text_learning_rate", "1e-5", "--max_steps", "1", "--warmup_steps", "1")
    assert cli.main(["pretrain", *argv]) == 0
    groups = seen["optimizer"].param_groups
    assert {g["initial_lr"] for g in groups} == {1e-3, 1e-5}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert all(g["betas"] == (0.9, 0.95) for g in groups)


def test_training_goes_on_from_a_model_directory(finished, pretrain_argv, tmp_path, monkeypatch):
    start = ["--model_name_or_path", str(finished)]
    argv = pretrain_argv(*start, "--max_steps", "1", "--learning_rate", "0")
    assert cli.main(["pretrain", *argv]) == 0
    one, two = (MpmaForPreTraining.from_pretrained(p) for p in (finished, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert f"`{finished}`" in (tmp_path / "run" / "README.md").read_text()


def test_embeddings_of_a_split(finished, store_path, tmp_path, capsys):
    argv = ["embed", "--model", str(finished), "--data", str(store_path), "--split", "validate"]
    assert cli.main([*argv, "--out", str(tmp_path / "e.npz"), "--batch-size", "5"]) == 0
    arrays = np.load(tmp_path / "e.npz")
    store = Store(store_path)
    pairs = store.pairs.iloc[store.rows("validate")]
    assert arrays["image_id"].tolist() == pairs["image_id"].tolist()
    model = MpmaForPreTraining.from_pretrained(finished).eval()
    processor = MpmaProcessor.from_pretrained(finished)
    batch = processor(images=store.images[store.rows("validate")], text=pairs["report"].tolist())
    with torch.no_grad():
        image = model.get_image_features(batch.pop("pixel_values"))
        report = model.get_text_features(**batch)
    for kind, features in (("image", image), ("report", report)):
        # Batches of 5 against one of 16: float32 sums in another order.
        for name, expected in (("features", features.pooler_output), ("embeds", features.embeds)):
            np.testing.assert_allclose(arrays[f"{kind}_{name}"], expected, atol=1e-5)
    assert cli.main([*argv, "--out", str(tmp_path / "e.csv")]) == 2
    assert "out: expected a file name that ends in .npz" in capsys.readouterr().err


def error_of(argv, capsys):
    """The one line that a wrong call prints."""
    assert cli.main(["pretrain", *argv]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = [text for text in captured.err.splitlines() if text.startswith("mpma: error:")]
    return line


def test_user_errors_are_one_line(pretrain_argv, config_path, tmp_path, capsys):
    def error(*more):
        return error_of(pretrain_argv(*more), capsys)

    assert "no prepared store in /nowhere" in error("--data", "/nowhere")
    assert "did you mean 'fusion'" in error("--fusoin", "memory")
    assert "hidden_size: invalid int value" in error("--hidden_size", "wide")
    assert "NOPE is not a valid SchedulerType" in error("--lr_scheduler_type", "NOPE")
    assert "hidden_size must be a multiple" in error("--hidden_size", "33")
    assert "max_length: expected at most" in error("--max_length", "65")
    assert "a batch of 65 pairs" in error("--per_device_train_batch_size", "65")
    wrong_evaluation = ("--eval_strategy", "epoch", "--per_device_eval_batch_size", "17")
    assert "per_device_eval_batch_size: a batch of 17" in error(*wrong_evaluation)
    assert "model_name_or_path: no such" in error("--model_name_or_path", "/nowhere")
    assert "no complete checkpoint in" in error("--resume_from_checkpoint", "true")
    message = error("--resume_from_checkpoint", str(tmp_path / "none"))
    assert "expected true, false or the directory of a checkpoint" in message
    (tmp_path / "file").write_text("")
    message = error("--output_dir", str(tmp_path / "file" / "run"))
    assert "output_dir: cannot write to" in message and "Not a directory" in message
    assert "data: expected the directory" in error_of(
        [str(config_path), "--output_dir", str(tmp_path / "x")], capsys
    )
    assert "output_dir: expected a directory" in error_of([str(config_path)], capsys)


def test_a_store_for_another_image_size(pretrain_argv, tmp_path, capsys):
    other = write_store(tmp_path / "other", side=48, studies=16)
    message = error_of(pretrain_argv("--data", str(other)), capsys)
    assert "expected images of side 32" in message and "made for 48" in message
    assert "prepare it again with --side 32" in message


def test_a_model_with_another_tokenizer(finished, pretrain_argv, tmp_path, capsys):
    other = write_store(tmp_path / "other", vocab_size=120)
    argv = pretrain_argv("--data", str(other), "--model_name_or_path", str(finished))
    assert "has another tokenizer than" in error_of(argv, capsys)


def test_a_model_of_another_size_or_kind(finished, pretrain_argv, tmp_path, capsys):
    start = ["--model_name_or_path", str(finished), "--memory_slots", "8"]
    message = error_of(pretrain_argv(*start), capsys)
    assert f"model_name_or_path: {finished} has weights of another size" in message
    assert "model.fusion.memory.memory (16, 32) for (8, 32)" in message
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    message = error_of(pretrain_argv("--model_name_or_path", str(tmp_path / "bert")), capsys)
    assert "model_name_or_path: expected an MPMA model" in message and "'bert'" in message


def test_a_finished_run_is_not_overwritten_unasked(finished, pretrain_argv, capsys):
    before = json.loads((finished / "checkpoint-6" / "trainer_state.json").read_text())
    argv = pretrain_argv(out=finished)
    assert "holds checkpoint-6 of a run" in error_of(argv, capsys)
    after = json.loads((finished / "checkpoint-6" / "trainer_state.json").read_text())
    assert before == after


def test_overwriting_removes_the_old_run(pretrain_argv, tmp_path):
    run = tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_argv("--max_steps", "4")]) == 0
    (run / "eval").mkdir()
    (run / "eval" / "linear.json").write_text("results of the old model")
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert cli.main(["pretrain", *pretrain_argv("--max_steps", "2")]) == 2  # not unasked
    assert (run / "eval" / "linear.json").exists()
    again = pretrain_argv("--max_steps", "2", "--overwrite_output_dir", "true")
    assert cli.main(["pretrain", *again]) == 0
    assert not (run / "eval").exists()
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
