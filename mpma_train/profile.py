"""`mpma profile`: where the time of a run's training steps goes."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from mpma_train.output_paths import require_writable_directory
from mpma_train.phases import DATA, FORWARD, OPTIMIZER, STEP, Phases, by_phase, watch
from mpma_train.pretrain import build_trainer, open_store
from mpma_train.settings import Settings, parse_settings
from mpma_train.trainer import MpmaTrainer

WARMUP = 2
SHOWN = 15


def run(argv: Sequence[str]) -> int:
    """Train a few steps as `mpma pretrain` would, print where their time went, and keep it.

    Writes profile.json and trace.json, which Perfetto and chrome://tracing show. The run's own
    output directory is not touched.

    Args:
        argv: arguments of `mpma pretrain`, and this command's own.

    Raises:
        ValueError, OSError: settings, data or a directory that do not fit.
    """
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.profile_steps < 1:
        raise ValueError(f"profile_steps: expected at least 1, got {arguments.profile_steps}")
    require_writable_directory("profile_dir", arguments.profile_dir)
    settings = parse_settings(rest, prog="mpma profile")
    store = open_store(settings)
    with tempfile.TemporaryDirectory() as folder:
        _shorten(settings, folder, arguments.profile_steps)
        trainer = build_trainer(settings, store, settings.training_arguments())
        found, profiler = profiled(trainer, arguments.profile_steps)
    if trainer.is_world_process_zero():
        arguments.profile_dir.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(arguments.profile_dir / "trace.json"))
        text = json.dumps(found, indent=1) + "\n"
        (arguments.profile_dir / "profile.json").write_text(text, encoding="utf-8")
        print(words(found))
        print(f"written to {arguments.profile_dir}")
    return 0


def profiled(trainer: MpmaTrainer, steps: int) -> tuple[dict[str, Any], profile]:
    """Train until it is warm and `steps` more; what these took, and the profiler that saw them."""
    device = trainer.args.device
    phases = Phases(device)
    parts = watch(trainer, phases)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(
        activities=activities, schedule=schedule(wait=0, warmup=WARMUP, active=steps, repeat=1)
    ) as profiler:
        counter = _Count(profiler, phases)
        trainer.add_callback(counter)
        trainer.train()
    seconds = {name: value / steps for name, value in phases.seconds.items()}
    whole = counter.seconds / steps
    names = {DATA, STEP, FORWARD, OPTIMIZER, *parts}
    pairs = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    pairs *= trainer.args.world_size
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "steps": steps,
        "pairs": pairs,
        "seconds": whole,
        "pairs_per_second": pairs / whole,
        "phases": by_phase(dict.fromkeys(names, 0.0) | seconds, parts, whole),
        "operators": operators(profiler, names, steps, device.type),
    }, profiler


def operators(profiler: profile, names: set[str], steps: int, device: str) -> list[dict[str, Any]]:
    """PyTorch's operators, or a GPU's kernels, by the time they take themselves, a step."""
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [
        {"name": e.key, "calls": e.count / steps, "seconds": 1e-6 * getattr(e, field) / steps}
        for e in profiler.key_averages()
        if e.key not in names and not e.key.startswith(("ProfilerStep", "Optimizer."))
    ]
    return sorted((row for row in rows if row["seconds"] > 0), key=lambda row: -row["seconds"])


def words(found: dict[str, Any]) -> str:
    """Two tables: phases, and the operators that take most."""
    whole = found["seconds"]
    lines = [
        f"{found['steps']} steps of {found['pairs']} pairs on {found['device']}: "
        f"{1e3 * whole:.1f} ms a step, {found['pairs_per_second']:.1f} pairs/s, while profiled",
        "",
        *(_line(name, value, whole) for name, value in found["phases"].items()),
        "",
        *(
            f"{_line(row['name'][:50], row['seconds'], whole)}  {row['calls']:.0f} calls"
            for row in found["operators"][:SHOWN]
        ),
    ]
    return "\n".join(lines)


def _line(name: str, seconds: float, whole: float) -> str:
    return f"{name:<52}{1e3 * seconds:>10.2f} ms {seconds / whole:>6.1%}"


def _shorten(settings: Settings, folder: str, steps: int) -> None:
    """A run of a few steps that saves, evaluates and logs nothing."""
    settings.training.pop("resume_from_checkpoint", None)
    settings.training |= {"output_dir": folder, "max_steps": WARMUP + steps, "report_to": "none"}
    strategies = ("save_strategy", "eval_strategy", "logging_strategy")
    settings.training |= dict.fromkeys(strategies, "no") | {"load_best_model_at_end": False}


class _Count(TrainerCallback):
    """Tells the profiler of every step, and counts once it is warm."""

    def __init__(self, profiler: profile, phases: Phases):
        self._profiler, self._phases = profiler, phases
        self._start = 0.0
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step's end is the last one's that counts."""
        if state.global_step == state.max_steps:
            self.seconds, self._phases.counting = self._phases.now() - self._start, False
        self._profiler.step()
        if state.global_step == WARMUP:  # the profiler has begun to record, which takes a while
            self._start, self._phases.counting = self._phases.now(), True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpma profile",
        usage="mpma profile CONFIG.yaml --data STORE [--setting value ...] [options]",
        description="Train a few steps as `mpma pretrain` would and show where their time goes.",
        epilog="Everything else is a setting of `mpma pretrain`; see its --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--profile_steps", type=int, default=5, metavar="N", help="steps (5)")
    parser.add_argument(
        "--profile_dir",
        type=Path,
        default=Path("runs/profile"),
        metavar="DIR",
        help="where profile.json and trace.json go (runs/profile)",
    )
    return parser
