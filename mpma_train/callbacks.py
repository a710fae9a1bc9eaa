"""What happens around the steps: the epoch's number, the check for finite numbers, the log."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mpma_train.data.sampler import StudySampler

# Every line of metrics.jsonl has these, averaged since the line before; null where the model has
# no such part. pairs_per_second counts all processes, data_wait is the share of the time in which
# the first one waited for data, peak_memory_mb the device's (on a CPU the process's) highest so far
# in MiB, memory_used_share the share of the memory's slots that were read.
LOGGED = (
    "step",
    "epoch",
    "loss",
    "loss_image",
    "loss_report",
    "loss_global",
    "loss_local",
    "learning_rate",
    "grad_norm",
    "pairs_per_second",
    "data_wait",
    "peak_memory_mb",
    "memory_used_share",
    "memory_perplexity",
)


class EpochCallback(TrainerCallback):
    """Tells the sampler the epoch's number, from the trainer's state and so also when resumed."""

    def __init__(self, sampler: StudySampler):
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Round down: in a run resumed within an epoch the state holds a fraction."""
        self._sampler.epoch = int(state.epoch or 0)


class LogBeforeSave(TrainerCallback):
    """Logs whenever a checkpoint is written.

    Losses are averaged since the last line, and a resumed run starts a new average: with a line at
    every checkpoint both average over the same steps.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs after transformers' own callback has decided whether to save."""
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class MetricsLog(TrainerCallback):
    """Writes `metrics.jsonl` and prints every line in words.

    The file always equals the trainer's own history, which every checkpoint carries: a resumed run
    writes it anew from there, so that no line is lost, doubled, or left of steps that are repeated.
    """

    def __init__(self, path: Path):
        self._path = path
        self._first_step = 0
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the file to the state that training starts from."""
        self._first_step = state.global_step
        self._started = time.monotonic()
        if not state.is_world_process_zero:
            return
        lines = [_line(logs) for logs in state.log_history]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line for line in lines if line), encoding="utf-8")
        os.replace(temporary, self._path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the newest entry of the history and print it."""
        if not state.is_world_process_zero:
            return
        logs = state.log_history[-1]
        line = _line(logs)
        if line:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        print(self._words(logs, state), flush=True)

    def _words(self, logs: dict[str, Any], state: TrainerState) -> str:
        if "loss" not in logs:
            values = (f"{k} {v:.4g}" for k, v in logs.items() if k not in ("step", "epoch"))
            return f"step {logs['step']}  " + "  ".join(values)
        steps = state.global_step - self._first_step
        remaining = (state.max_steps - state.global_step) / max(steps, 1)
        seconds = int(remaining * (time.monotonic() - self._started))
        parts = {
            name.removeprefix("loss_"): logs[name]
            for name in ("loss_image", "loss_report", "loss_global", "loss_local")
            if name in logs
        }
        words = [
            f"step {logs['step']}/{state.max_steps}",
            f"epoch {logs['epoch']:.2f}",
            f"loss {logs['loss']:.4f}",
            *(f"{name} {value:.4f}" for name, value in parts.items()),
            f"lr {logs['learning_rate']:.2e}",
            f"grad {logs['grad_norm']:.2f}" if "grad_norm" in logs else "",
            f"{logs['pairs_per_second']:.0f} pairs/s",
            f"data wait {logs['data_wait']:.0%}",
            f"peak {logs['peak_memory_mb']:.0f} MB",
            f"slots used {logs['memory_used_share']:.0%}" if "memory_used_share" in logs else "",
            f"left {seconds // 60}:{seconds % 60:02d}",
        ]
        return "  ".join(word for word in words if word)


def _line(logs: dict[str, Any]) -> str:
    """One line of the file, or nothing for the trainer's closing summary."""
    if "loss" in logs:
        record = {name: logs.get(name) for name in LOGGED}
    elif "eval_loss" in logs:
        record = {"step": logs["step"]} | logs
    else:
        return ""
    return json.dumps(record) + "\n"


def gradients_are_finite(model: nn.Module) -> torch.Tensor:
    """Whether the norm of all gradients is finite, as a bool tensor on their device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.isfinite(torch.nn.utils.get_total_norm(gradients))
