"""Read an MPMA model from its directory, whole or not at all."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mpma_train.models import MpmaConfig, MpmaForPreTraining


def load_model(
    path: Path | str, config: MpmaConfig | None = None, *, setting: str = "model"
) -> MpmaForPreTraining:
    """The model of a directory, in evaluation mode.

    Args:
        path: as `save_pretrained` writes it.
        config: settings that the weights must fill; by default the directory's own.
        setting: what the user named the directory with, for the errors.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no MPMA model, or its weights are not exactly those of the settings.
    """
    check_directory(path, setting=setting)
    try:
        model, report = MpmaForPreTraining.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(f"{setting}: weights in {path} are not readable: {error}") from None
    if faults := _faults(report):
        raise ValueError(f"{setting}: {path} {'; '.join(faults)}")
    return model.eval()


def check_directory(path: Path | str, *, setting: str = "model") -> None:
    """Whether a directory says that it holds an MPMA model.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: its config.json is missing, unreadable or another model's.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{setting}: no such directory: {path}")
    kind = _model_type(Path(path, "config.json"))
    if kind != MpmaConfig.model_type:
        raise ValueError(f"{setting}: expected an MPMA model in {path}, its config.json {kind}")


def _faults(report: dict[str, Any]) -> list[str]:
    """What does not fit, with the name of every tensor."""
    sizes = [
        f"{name} {tuple(found)} for {tuple(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    names = {
        "lacks fitting weights for": sorted(report["missing_keys"]),
        "has weights of another size": sizes,
        "has weights without a place": sorted(report["unexpected_keys"]),
    }
    return [f"{fault} {', '.join(found)}" for fault, found in names.items() if found]


def _model_type(config: Path) -> str:
    """The model type of a config.json, or what is wrong with the file."""
    if not config.is_file():
        return "is missing"
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is no JSON file ({error})"
    kind = values.get("model_type") if isinstance(values, dict) else None
    return kind if kind == MpmaConfig.model_type else f"has model_type {kind!r}"
