"""transformers' Trainer for MPMA: order of the data, optimiser, logged parts, stop at NaN."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from mpma_train.callbacks import EpochCallback, LogBeforeSave, MetricsLog, gradients_are_finite
from mpma_train.data.dataset import PairDataset
from mpma_train.data.sampler import StudySampler
from mpma_train.models.parameters import get_parameter_groups

_PARTS = (
    "loss_image",
    "loss_report",
    "loss_global",
    "loss_local",
    "memory_used_share",
    "memory_perplexity",
)


class MpmaTrainer(Trainer):
    """Trainer whose log carries every part of the loss, and whose resumed runs repeat themselves.

    Args:
        text_learning_rate: learning rate of the text encoder where it differs from the rest.
        **kwargs: as for `transformers.Trainer`; the data sets are `PairDataset`s.
    """

    def __init__(self, *, text_learning_rate: float | None = None, **kwargs: Any):
        self._text_learning_rate = text_learning_rate
        super().__init__(**kwargs)
        # Left behind there for generative models; MpmaConfig takes only what it knows.
        del self.model.config.use_cache
        # Each loss is a mean over its micro-batch already; True would scale it once more.
        self.model_accepts_loss_kwargs = False
        self._train_sampler = StudySampler(self.train_dataset.study_ids, self.args.seed)
        self._clear_interval()
        self._eval_parts = _Means()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(EpochCallback(self._train_sampler))
        self.add_callback(LogBeforeSave())
        self.add_callback(MetricsLog(Path(self.args.output_dir) / "metrics.jsonl"))
        self.add_callback(_StopIfNotFinite(self))

    def _clear_interval(self) -> None:
        self._parts = _Means()
        self._pairs = 0
        self._waited = 0.0
        self._interval_start = time.perf_counter()
        self.step_losses: list[torch.Tensor] = []

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers'; the first line's throughput counts from here."""
        self._clear_interval()
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StudySampler:
        return self._train_sampler

    def _get_eval_sampler(self, eval_dataset: PairDataset) -> StudySampler:
        """One fixed order at epoch 0, and one image a study here too."""
        return StudySampler(eval_dataset.study_ids, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that `--optim` names, on MPMA's parameter groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = get_parameter_groups(model, self.args.weight_decay, self._text_learning_rate)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Fetch the batches of one optimizer step and count the time and the pairs."""
        started = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - started
        self._pairs += sum(len(batch["input_ids"]) for batch in batches) * self.args.world_size
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As transformers', and keep the loss for the check before the optimizer step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_losses.append(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's loss; its parts are kept on the device until the next line of the log."""
        outputs = model(**inputs)
        means = self._parts if model.training else self._eval_parts
        means.add({name: outputs[name] for name in _PARTS if outputs.get(name) is not None})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Only the loss: transformers' own step computes none for a batch without labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers'; its time is no part of the interval that the log's throughput is of."""
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._interval_start += time.perf_counter() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the interval's parts, throughput, data wait and memory to a line of the log."""
        if "loss" in logs:
            elapsed = time.perf_counter() - self._interval_start
            logs |= self._parts.reduced(self.accelerator)
            logs["pairs_per_second"] = self._pairs / elapsed
            logs["data_wait"] = self._waited / elapsed
            logs["peak_memory_mb"] = _peak_memory_mb(self.args.device)
            self._clear_interval()
        elif "eval_loss" in logs:
            parts = self._eval_parts.reduced(self.accelerator)
            logs |= {f"eval_{name}": value for name, value in parts.items()}
            self._eval_parts = _Means()
        super().log(logs, start_time)


class _Means:
    """Means of named scalars, summed on their device so that a step never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        self._count += 1
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduced(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes, in one transfer; every process has to call it."""
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._count
        return dict(zip(self._sums, accelerator.reduce(means, "mean").tolist(), strict=True))


class _StopIfNotFinite(TrainerCallback):
    """Stops before a step that would write NaN into the weights, and so into the checkpoints."""

    def __init__(self, trainer: MpmaTrainer):
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """One transfer from the device a step, the price of stopping in time."""
        losses = torch.stack(self._trainer.step_losses)
        self._trainer.step_losses.clear()
        finite = torch.isfinite(losses).all()
        # fp16's loss scaler meets infinite gradients by design and leaves such steps out itself.
        if not args.fp16:
            finite = finite & gradients_are_finite(model).to(finite.device)
        if not finite:
            raise FloatingPointError(
                f"step {state.global_step + 1}: loss {losses.sum().item():.4g} or its gradient is "
                f"not finite; stopped before the optimizer step, checkpoints in {args.output_dir} "
                f"are untouched"
            )


def _peak_memory_mb(device: torch.device) -> float:
    """Peak in MiB of memory allocated on the device, or of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
