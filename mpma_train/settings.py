"""Settings of a pretraining run: YAML gives defaults, the command line wins, the result is saved.

One flat set of names from three places: `TrainingArguments` of transformers, `MpmaConfig`, and
`DataSettings` below. Values from YAML pass through the same typed parser as the command line.
"""

import dataclasses
import difflib
import json
import re
from argparse import HelpFormatter, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from mpma_train.models import MpmaConfig

# Decided by the tokenizer of the store, so that a model cannot disagree with its data.
_FROM_TOKENIZER = {
    "vocab_size",
    "pad_token_id",
    "cls_token_id",
    "sep_token_id",
    "mask_token_id",
    "unk_token_id",
    "special_token_ids",
}

_PRESETS = Path(__file__).parent / "configs"


@dataclass
class DataSettings:
    """Settings of the data, and of where training starts."""

    _argument_group_name = "data"

    data: str | None = field(default=None, metadata={"help": "Prepared store to train on."})
    max_length: int = field(
        default=128, metadata={"help": "Longest report in tokens; what comes after is cut."}
    )
    shuffle_sentences: bool = field(
        default=False, metadata={"help": "New order of a report's sentences every epoch."}
    )
    augment: bool = field(
        default=False,
        metadata={"help": "Light augmentation of images: shift by a pixel, contrast, noise."},
    )
    shuffle_pairs: bool = field(
        default=False,
        metadata={"help": "Control: give every study another one's report, once and seeded."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "MPMA model directory to start from (see mpma convert)."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the text encoder, where it differs."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start again in a directory that holds a run, removing its checkpoints."},
    )


@dataclass
class MpmaTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of masked pretraining.

    Raises:
        ValueError: a combination that would break exact resume or repeat a study within a batch.
    """

    _argument_group_name = "training"

    learning_rate: float = field(default=1.5e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after warmup."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of weight matrices."})
    # The filter logs 0.0 for a NaN and lets the run go on until its good checkpoints are gone.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept off: a loss that is not finite stops the run."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between lines of the log."})
    report_to: str = field(default="tensorboard", metadata={"help": "Where to log beside files."})
    # A filled-up last batch would show a study twice, a short one has fewer negatives.
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, incomplete batch of an epoch."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: the collator makes the model's inputs."}
    )

    def __post_init__(self) -> None:
        refused = {
            "logging_nan_inf_filter": (True, "it hides a loss that is not finite"),
            "dataloader_persistent_workers": (True, "a resumed run would not repeat the losses"),
            "ignore_data_skip": (True, "a resumed run would see its first batches twice"),
        }
        for name, (value, why) in refused.items():
            if getattr(self, name) is value:
                raise ValueError(f"{name}: {str(value).lower()} is refused, {why}")
        for name, least in (
            ("learning_rate", 0),
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        # Declared as text, though transformers wants a truth value in its place.
        self.fsdp = {"true": True, "false": None}.get(self.fsdp, self.fsdp)
        super().__post_init__()
        # Pinning is for copies to a device, and torch warns where there is none.
        self.dataloader_pin_memory &= self.device.type != "cpu"
        if self.world_size > 1 and not self.dataloader_drop_last:
            raise ValueError(
                "dataloader_drop_last: false is refused on several processes, the last batch "
                "would be filled with studies it already holds"
            )


@dataclass
class Settings:
    """What a run was asked for.

    Attributes:
        data: settings of the data.
        model: `MpmaConfig` fields that were named explicitly; everything else is the default, or
            that of `model_name_or_path`.
        training: arguments for `MpmaTrainingArguments`, not yet built since that chooses devices.
    """

    data: DataSettings
    model: dict[str, Any]
    training: dict[str, Any]

    def training_arguments(self) -> MpmaTrainingArguments:
        """Build transformers' arguments, which sets devices and processes up."""
        return MpmaTrainingArguments(**self.training)

    def effective(self, model_config: MpmaConfig) -> dict[str, Any]:
        """Every setting of the run by name, defaults included, as YAML can hold it."""
        training = {
            f.name: f.default
            for f in dataclasses.fields(MpmaTrainingArguments)
            if f.init and f.default is not dataclasses.MISSING
        }
        model = {f.name: getattr(model_config, f.name) for f in _model_fields()}
        values = dataclasses.asdict(self.data) | model | training | self.training
        # What decides how this start goes, and what must stay secret, is no property of the run.
        for name in ("resume_from_checkpoint", "overwrite_output_dir", "local_rank", "hub_token"):
            values.pop(name, None)
        return {name: value for name, value in values.items() if value not in (None, "")}


def _model_fields() -> list[dataclasses.Field]:
    names = MpmaConfig.setting_names() - _FROM_TOKENIZER
    return [f for f in dataclasses.fields(MpmaConfig) if f.name in names]


def _model_settings_class() -> type:
    """A dataclass of MpmaConfig's own fields, without those of every transformers configuration."""
    fields = [
        # The parser knows one type a setting, and MpmaConfig takes 1 where it takes 1.0.
        (f.name, float if f.type == float | int else f.type, field(default=f.default))
        for f in _model_fields()
    ]
    return dataclasses.make_dataclass(
        "ModelSettings", fields, namespace={"_argument_group_name": "model"}
    )


class _Parser(HfArgumentParser):
    """Raises ValueError in one line where argparse prints its usage and exits."""

    def error(self, message: str) -> None:
        raise ValueError(re.sub(r"^argument --(\w+)(/--[\w-]+)?", r"\1", message))


class _Unset:
    """Stands where a setting was not named."""


def parse_settings(argv: Sequence[str], *, prog: str = "mpma pretrain") -> Settings:
    """Read the configuration file that `argv` names, then let the rest of `argv` override it.

    Args:
        argv: `CONFIG.yaml`, or the name of a preset, and `--setting value` pairs.
        prog: name of the command for its help.

    Raises:
        FileNotFoundError: the configuration file is missing.
        ValueError: an unknown setting (with the nearest known name), a value of the wrong type, or
            a file that is not a flat YAML mapping.
    """
    classes = (DataSettings, _model_settings_class(), MpmaTrainingArguments)
    parser = _Parser(classes, prog=prog, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument(
        "config", help="YAML file with defaults for any setting below, or the name of a preset"
    )
    groups = [[f.name for f in dataclasses.fields(c) if f.init] for c in classes]
    known = [name for group in groups for name in group]

    given = _parse(parser, known, list(argv))
    values: dict[str, Any] = {}
    config = _named(given.pop("config"))
    for name, value in _read_yaml(config).items():
        if name not in known:
            raise ValueError(f"{config}: unknown setting {name!r}{_nearest(name, known)}")
        if value is None:
            continue
        try:
            parsed = _parse(parser, known, [str(config), f"--{name}={_as_text(value)}"])
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from None
        values[name] = parsed[name]
    values |= given
    data, model, training = ({n: values[n] for n in g if n in values} for g in groups)
    return Settings(DataSettings(**data), model, training)


def _named(config: str) -> Path:
    """The preset of that name, or the file."""
    preset = _PRESETS / f"{config}.yaml"
    return preset if preset.is_file() else Path(config)


def _parse(parser: _Parser, known: list[str], argv: list[str]) -> dict[str, Any]:
    """Only what `argv` names, typed."""
    namespace = Namespace(**dict.fromkeys(known, _Unset))
    namespace, rest = parser.parse_known_args(argv, namespace)
    if rest:
        name = rest[0].split("=")[0].removeprefix("--").replace("-", "_")
        raise ValueError(f"unknown setting {rest[0]!r}{_nearest(name, known)}")
    return {name: value for name, value in vars(namespace).items() if value is not _Unset}


def _as_text(value: Any) -> str:
    """A YAML value as it would stand on the command line."""
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def save_settings(values: dict[str, Any], path: Path) -> None:
    """Write effective settings as a file that `mpma pretrain` reads back."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


def changed_settings(values: dict[str, Any], path: Path) -> list[str]:
    """What differs from the settings saved at `path`, a line each; nothing without that file."""
    before = _read_yaml(path) if path.is_file() else values
    return [
        f"{name}: {before.get(name)} -> {values.get(name)}"
        for name in sorted(before.keys() | values.keys())
        if before.get(name) != values.get(name)
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected a mapping of setting names to values")
    return content
