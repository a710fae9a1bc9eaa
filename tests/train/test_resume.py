"""A run that is killed and resumed gives the losses of the run that was not."""

import json
import signal

import pytest
from train_runs import pretrain_in_child, read_metrics

# Four steps an epoch, a checkpoint every second: 2, 6 and 10 lie in mid-epoch, 4 and 8 at an end.
STEPS = ["--max_steps", "12", "--save_steps", "2", "--text_dropout", "0.1"]
CLOCK = ("pairs_per_second", "data_wait", "peak_memory_mb")


def without_clock(lines):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(store_path, config_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    argv = [str(config_path), "--data", str(store_path), "--output_dir", str(out), *STEPS]
    assert pretrain_in_child(argv) == 0
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice_and_resumed_exactly(uninterrupted, pretrain_argv, tmp_path, workers):
    run = tmp_path / "run"
    argv = pretrain_argv(*STEPS, "--dataloader_num_workers", str(workers))
    resume = [*argv, "--resume_from_checkpoint", "true"]
    # In mid-epoch: step 7 was not logged yet, and step 6 is the last checkpoint.
    assert pretrain_in_child(argv, kill_at=("on_step_end", 7)) == -signal.SIGKILL
    assert read_metrics(run)[-1]["step"] == 6
    # At the second epoch's end, with the checkpoint of its last step written.
    assert pretrain_in_child(resume, kill_at=("on_epoch_end", 8)) == -signal.SIGKILL
    assert read_metrics(run)[-1]["step"] == 8
    state = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["epoch"] == 2.0 and not (run / "checkpoint-10").exists()
    assert pretrain_in_child(resume) == 0
    expected = without_clock(read_metrics(uninterrupted))
    assert [line["step"] for line in expected] == list(range(1, 13))
    assert without_clock(read_metrics(run)) == expected
    model = "model.safetensors"
    assert (run / model).read_bytes() == (uninterrupted / model).read_bytes()


def test_lines_after_the_resumed_step_are_dropped(uninterrupted, pretrain_argv, tmp_path):
    run = tmp_path / "run"
    assert pretrain_in_child(pretrain_argv(*STEPS), kill_at=("on_step_end", 8)) == -signal.SIGKILL
    (run / "metrics.jsonl").open("a").write('{"step": 7, "loss": 99}\n{"step": 8, "lo')
    # What a kill while writing leaves: the newest checkpoint lacks its last file.
    (run / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1.')
    argv = pretrain_argv(*STEPS, "--resume_from_checkpoint", "true", "--max_steps", "12")
    assert pretrain_in_child(argv) == 0
    assert without_clock(read_metrics(run)) == without_clock(read_metrics(uninterrupted))


def test_a_named_checkpoint_resumes_into_another_directory(uninterrupted, pretrain_argv, tmp_path):
    checkpoint = uninterrupted / "checkpoint-10"
    argv = pretrain_argv(*STEPS, "--resume_from_checkpoint", str(checkpoint))
    assert pretrain_in_child(argv) == 0
    expected = without_clock(read_metrics(uninterrupted))
    assert without_clock(read_metrics(tmp_path / "run")) == expected


def test_a_checkpoint_of_weights_alone_is_no_start(pretrain_argv, capsys, tmp_path):
    from mpma_train import cli

    argv = pretrain_argv("--max_steps", "2", "--save_only_model", "true")
    assert cli.main(["pretrain", *argv]) == 0
    assert cli.main(["pretrain", *argv, "--resume_from_checkpoint", "true"]) == 2
    captured = capsys.readouterr()
    assert "no complete checkpoint" in captured.err and "lacks scheduler.pt" in captured.out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["memory_slots"] == 16


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    from mpma_train.checkpoints import find_checkpoint

    with pytest.raises(ValueError, match="directory of a checkpoint, got 'nowhere', which is none"):
        find_checkpoint(tmp_path, "nowhere", overwrite=False)
