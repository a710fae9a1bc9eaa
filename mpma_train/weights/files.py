"""Read a checkpoint from disk. Nothing is unpickled beyond tensors and plain containers."""

import argparse
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Under these names training scripts keep the model beside its optimizer.
_NESTED = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of values in [0, 1], one a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Checkpoint:
    """What lies on disk.

    Attributes:
        source: the path that was named.
        tensors: every tensor by its name.
        config: content of the config.json beside the weights, empty where there is none.
        normalisation: of the images it was trained on; None where unknown.
    """

    source: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    normalisation: Normalisation | None = None


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a directory in transformers' layout, or a bare .safetensors, .bin, .pt, .pth or .ckpt.

    Raises:
        FileNotFoundError: there is no such path, or no weights in the directory.
        ValueError: the file is damaged, of another kind, or holds more than tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: no such file or directory: {path}")
    if path.is_file():
        return Checkpoint(path, _read_file(path))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        tensors |= _read_file(file)
    return Checkpoint(path, tensors, _read_json(path / "config.json"), read_normalisation(path))


def read_normalisation(folder: Path) -> Normalisation | None:
    """What a model directory says of its images, in either of transformers' files.

    Raises:
        ValueError: a file that is not JSON.
    """
    settings = _read_json(folder / "preprocessor_config.json")
    settings = settings or _read_json(folder / "processor_config.json").get("image_processor", {})
    if "image_mean" not in settings or not settings.get("do_normalize", True):
        return None
    mean, std = (
        tuple(value) if isinstance(value, list) else (value,)
        for value in (settings["image_mean"], settings["image_std"])
    )
    return Normalisation(mean, std)


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(_read_json(index)["weight_map"].values()))
            outside = [n for n in names if Path(n).name != n]
            if outside:
                raise ValueError(f"{index}: names files outside its directory: {outside}")
            return [folder / n for n in names]
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(
        f"no weights in {folder}: expected {' or '.join(_WEIGHTS)}; name the file itself if it is "
        "called otherwise"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not readable as safetensors: {error}") from None
    if path.suffix not in _PICKLED:
        expected = ", ".join((".safetensors", *_PICKLED))
        raise ValueError(f"{path}: expected one of {expected}, got {path.suffix or 'no suffix'}")
    try:
        # Training scripts keep their command line beside the weights; it is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: not readable as a file of tensors (weights_only=True): {first}"
        ) from None
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for name in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        found = sorted(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a dictionary of tensors, found {found}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in tensors):
        # DistributedDataParallel's wrapper.
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
