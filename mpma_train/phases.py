"""Where a training step's time goes: a clock with names, on the trainer and the model's parts."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from transformers import TrainerCallback

from mpma_train.trainer import MpmaTrainer

DATA, STEP, FORWARD, OPTIMIZER = "data", "forward and backward", "forward", "optimizer"
BACKWARD, OTHER = "backward", "everything else"


class Phases:
    """Seconds by name; a name within another counts for both.

    The device is waited for at both ends of a phase, so that its work counts where it was asked
    for. The names stand in a profiler's trace too.

    Attributes:
        seconds: of what ran while `counting`.
    """

    def __init__(self, device: torch.device):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counting = False
        self._device = device
        self._open: list[tuple[str, record_function, float]] = []

    def now(self) -> float:
        """The clock, once the device has done what it was asked for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def enter(self, name: str) -> None:
        """Begin a phase."""
        mark = record_function(name)
        mark.__enter__()
        self._open.append((name, mark, self.now()))

    def leave(self) -> None:
        """End the phase that was begun last."""
        name, mark, start = self._open.pop()
        if self.counting:
            self.seconds[name] += self.now() - start
        mark.__exit__(None, None, None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The same around a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def watch_call(self, owner: Any, method: str, name: str) -> None:
        """Every call of `owner.method` is a phase."""
        original: Callable = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def watch_module(self, module: nn.Module, name: str) -> None:
        """Every forward of `module` is a phase."""
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)


def watch(trainer: MpmaTrainer, phases: Phases) -> list[str]:
    """Make phases of the trainer's calls and of the model's parts; returns the parts' names."""
    phases.watch_call(trainer, "get_batch_samples", DATA)
    phases.watch_call(trainer, "training_step", STEP)
    phases.watch_call(trainer, "compute_loss", FORWARD)
    trainer.add_callback(_WatchOptimizer(phases))
    if trainer.args.torch_compile:
        return []  # hooks would cut the graph
    model = trainer.model
    modules = {**dict(model.model.named_children()), **dict(model.named_children())}
    modules.pop("model")
    parts = {name: module for name, module in modules.items() if module is not None}
    for name, module in parts.items():
        phases.watch_module(module, name)
    return list(parts)


class _WatchOptimizer(TrainerCallback):
    """The optimiser is made when training begins."""

    def __init__(self, phases: Phases):
        self._phases = phases

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: torch.optim.Optimizer, **kwargs: Any
    ) -> None:
        """Around the step of the optimiser itself, whatever wraps it."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        optimizer.register_step_pre_hook(lambda *_: self._phases.enter(OPTIMIZER))
        optimizer.register_step_post_hook(lambda *_: self._phases.leave())


def by_phase(seconds: dict[str, float], parts: list[str], whole: float) -> dict[str, float]:
    """Seconds of phases that add up to `whole`, the forward cut into the model's parts."""
    forward, step = seconds[FORWARD], seconds[STEP]
    found = {DATA: seconds[DATA]}
    found |= {f"{FORWARD}, {name}": seconds[name] for name in parts if seconds[name] > 0}
    rest = forward - sum(seconds[name] for name in parts)
    found[f"{FORWARD}, rest" if parts else FORWARD] = rest
    found |= {BACKWARD: step - forward, OPTIMIZER: seconds[OPTIMIZER]}
    return found | {OTHER: whole - sum(found.values())}
