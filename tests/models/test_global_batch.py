"""Two processes give the loss and the gradient of one with both their batches, by DDP or FSDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from global_batch_worker import CASES, global_batch, step
from small_model import NO_DROPOUT, build

from mpma_train.models import distributed

# What is required of the losses and of the gradient as a whole.
BOUND = 1e-6
WORKER = Path(__file__).with_name("global_batch_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes make of every case."""
    folder = tmp_path_factory.mktemp("global_batch")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(WORKER), str(rank), "2", str(folder)]
            with log.open("w") as stderr:
                workers.append(subprocess.Popen(command, env=environment, stderr=stderr))
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return torch.load(folder / "found.pt", weights_only=True)


def relative_difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_processes_equal_one(case, found):
    settings, dtype, _ = CASES[case]
    model = build(**(NO_DROPOUT | settings)).to(dtype)
    losses, gradients = step(model, global_batch(dtype))
    of_two = found[case]
    assert losses.keys() == of_two["losses"].keys()
    assert len(losses) == (5 if model.config.global_active else 4)
    for name, loss in losses.items():
        assert relative_difference(of_two["losses"][name], loss) < BOUND, name
    assert gradients.keys() == of_two["gradients"].keys()
    pairs = [(of_two["gradients"][name], gradient) for name, gradient in gradients.items()]
    both = [torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True)]
    assert relative_difference(*both) < BOUND
    if dtype == torch.float64:
        # Each by itself too, also the small ones, which in float32 hold more rounding than that.
        for name, (double, single) in zip(gradients, pairs, strict=True):
            # A key's bias moves all scores of a query alike: its gradient is rounding alone.
            if not name.endswith(("key.bias", "k_proj.bias")):
                assert relative_difference(double, single) < BOUND, name


def test_ranks_with_batches_of_different_sizes_are_refused(monkeypatch):
    counts = torch.tensor([[8, 20, 31], [7, 20, 30]])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_counts", lambda own: counts)
    with pytest.raises(ValueError, match=r"same size, got \[8, 7\].*dataloader_drop_last"):
        distributed.global_counts(8, 20, torch.tensor(31))
