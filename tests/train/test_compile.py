"""`mpma pretrain --torch_compile`: the whole training step through dynamo and AOTAutograd."""

import pytest
import torch
from train_runs import read_metrics

from mpma_train import cli


@pytest.fixture
def counters():
    """Of what one test compiles, which is gone after it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_a_compiled_run_repeats_the_losses(pretrain_argv, tmp_path, counters):
    """aot_eager traces forward and backward, and runs the operators that eager mode runs.

    The default, inductor, writes and compiles C++ for them, which takes minutes.
    """
    compiled = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
    losses = []
    for settings in (compiled, []):
        counters.clear()
        out = tmp_path / f"run-{len(losses)}"
        settings = [*settings, "--text_dropout", "0", "--fusion_dropout", "0"]
        assert cli.main(["pretrain", *pretrain_argv(*settings, out=out)]) == 0
        assert (counters["aot_autograd"]["ok"] > 0) == ("--torch_compile" in settings)
        losses.append([(line["loss"], line["grad_norm"]) for line in read_metrics(out)])
    assert len(losses[0]) == 4 and losses[0] == losses[1]
