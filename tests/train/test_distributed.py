"""Two processes under torchrun give the losses of one process with the global batch."""

import os
import subprocess
import sys

import pytest
from train_runs import read_metrics

from mpma_train import cli

# Dropout is drawn by each process for its own rows, so only without it can the two be compared.
SETTINGS = ["--max_steps", "8", "--text_dropout", "0", "--fusion_dropout", "0"]


def pretrain_on_two_processes(argv):
    """`mpma pretrain` under torchrun; returns what subprocess does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, "-m", "mpma_train", "pretrain", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_two_gloo_processes_equal_one(pretrain_argv, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    argv = pretrain_argv(*SETTINGS, "--per_device_train_batch_size", "16", out=one)
    assert cli.main(["pretrain", *argv]) == 0
    argv = pretrain_argv(*SETTINGS, "--per_device_train_batch_size", "8", out=two)
    done = pretrain_on_two_processes(argv)
    assert done.returncode == 0, done.stderr[-3000:]
    # One process speaks, once a step.
    assert done.stdout.count("step 5/8") == 1
    lines = [read_metrics(run) for run in (one, two)]
    assert [line["step"] for line in lines[1]] == list(range(1, 9))
    for single, double in zip(*lines, strict=True):
        for name in ("loss", "loss_image", "loss_report", "loss_global", "loss_local"):
            # float32 sums in another order, over up to eight steps of training.
            assert double[name] == pytest.approx(single[name], rel=2e-5), (name, single["step"])
        assert double["epoch"] == single["epoch"]
    assert (two / "model.safetensors").is_file() and (two / "README.md").is_file()


def test_sharding_that_would_be_left_out_is_refused(pretrain_argv):
    done = pretrain_on_two_processes(pretrain_argv("--fsdp", "true"))
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("mpma: error:")]
    assert "fsdp: accelerate shards on accelerators only" in line and "on cpu" in line
    assert "step 1/" not in done.stdout
