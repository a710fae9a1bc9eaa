"""`mpma convert`: published encoder weights as the starting weights of an MPMA model."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed

from mpma_train.data.store import Store
from mpma_train.models import MpmaConfig, MpmaForPreTraining, MpmaProcessor
from mpma_train.models.processing_mpma import MpmaImageProcessor
from mpma_train.output_paths import require_empty
from mpma_train.settings import parse_settings
from mpma_train.weights.files import Checkpoint, Normalisation, read_checkpoint
from mpma_train.weights.fit import (
    Change,
    FitReport,
    fit,
    fit_positions,
    fit_text_tables,
    fold_to_grey,
)
from mpma_train.weights.names import Named, image_names, text_names
from mpma_train.weights.sizes import check_named, image_settings, text_settings, usual_heads
from mpma_train.weights.vocabulary import (
    check_same_words,
    checkpoint_tokenizer,
    token_settings,
)

# What ImageNet models are trained with, so nearly every published MAE, ViT-MAE and timm ViT.
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_CARD = """\
---
library_name: mpma
---

# Starting weights for MPMA

Encoders filled from published weights by `mpma convert`; everything else is new (seed {seed}) and
has learned nothing. `conversion.json` names every tensor that was changed, missing or unused.

| part | source |
|---|---|
{rows}

Each source's own licence applies to these weights and to what is trained from them.
"""


@dataclass
class _Encoder:
    """One checkpoint, its tensors under our names, and the settings it decides."""

    checkpoint: Checkpoint
    named: dict[str, Named]
    settings: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mpma convert`."""
    add = parser.add_argument
    source = "a directory of transformers, or a .safetensors, .bin or .pth"
    add("--image", type=Path, metavar="PATH", help=f"MAE, ViT-MAE, ViT or timm ViT: {source}")
    add("--text", type=Path, metavar="PATH", help=f"BERT: {source}")
    add("--out", type=Path, required=True, metavar="DIR", help="model directory to write")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="store to train on: its tokenizer and the normalisation of its images are used",
    )
    add(
        "--config",
        type=Path,
        metavar="YAML",
        help="settings of the model, as for mpma pretrain; sizes are the checkpoint's by default",
    )
    for name in ("image_mean", "image_std"):
        add(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help="of the images the image checkpoint was trained on, a value a channel; by default "
            "from its preprocessor_config.json, else ImageNet's for three channels",
        )
    add("--seed", type=int, default=0, help="of everything that is new (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write a directory for `mpma pretrain --model_name_or_path`, and say what went into it.

    Raises:
        FileNotFoundError: a path that is not there.
        OSError: the output directory holds something, or nothing can be written there.
        ValueError: a checkpoint that cannot be read or does not fit, or nothing to convert.
    """
    if args.image is None and args.text is None:
        raise ValueError("convert: expected --image PATH, --text PATH or both, got neither")
    require_empty("out", args.out)
    image = _open(args.image, image_names, image_settings)
    text = _open(args.text, text_names, text_settings)
    store = Store(args.data) if args.data else None
    tokenizer = _tokenizer(store, args.text)
    config = _config(args, [e for e in (image, text) if e], tokenizer)
    theirs = _normalisation(args, image) if image else None
    images = _image_processor(config, theirs, store)

    set_seed(args.seed)
    model = MpmaForPreTraining(config)
    reports = {}
    if image:
        ours = Normalisation((images.image_mean,), (images.image_std,))
        changes = [fit_positions(config)]
        if config.num_channels == 1 and theirs not in (None, ours):
            changes.append(fold_to_grey(theirs, ours))
        reports["image_encoder"] = _fill(model.model.image_encoder, image, changes)
    if text:
        reports["text_encoder"] = _fill(model.model.text_encoder.bert, text, [fit_text_tables])

    out = args.out
    model.save_pretrained(out)
    if tokenizer is None:
        images.save_pretrained(out)
    else:
        tokenizer.model_max_length = config.max_position_embeddings
        MpmaProcessor(images, tokenizer).save_pretrained(out)
    account = {name: report.as_dict() for name, report in reports.items()}
    (out / "conversion.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {n.replace('_', ' ')} | `{r.source}` |" for n, r in reports.items())
    (out / "README.md").write_text(_CARD.format(seed=args.seed, rows=rows), encoding="utf-8")
    for name, report in reports.items():
        print("\n".join(report.lines(name.replace("_", " "))))
    print(f"model written to {out}")
    return 0


def _open(path: Path | None, names: Callable, settings: Callable) -> _Encoder | None:
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    named = names(checkpoint.tensors)
    return _Encoder(checkpoint, named, settings(checkpoint, named))


def _fill(encoder: nn.Module, source: _Encoder, changes: list[Change]) -> FitReport:
    checkpoint = source.checkpoint
    return fit(encoder, source.named, set(checkpoint.tensors), str(checkpoint.source), changes)


def _tokenizer(store: Store | None, text: Path | None) -> PreTrainedTokenizerFast | None:
    """The store's, which must agree with the text checkpoint's own; without a store its own."""
    own = checkpoint_tokenizer(text)
    if store is None:
        return own
    tokenizer = store.tokenizer()
    if own is not None:
        check_same_words(own, tokenizer, store.path)
    return tokenizer


def _config(
    args: argparse.Namespace,
    encoders: list[_Encoder],
    tokenizer: PreTrainedTokenizerFast | None,
) -> MpmaConfig:
    """What the checkpoints decide, then the named settings, then the tokenizer."""
    found: dict[str, Any] = {}
    for encoder in encoders:
        found |= encoder.settings
    named = parse_settings([str(args.config)]).model if args.config else {}
    from_tokenizer = token_settings(tokenizer) if tokenizer else {}
    config = MpmaConfig(**(usual_heads(found) | found | named | from_tokenizer))
    if config.image_encoder != "vit":
        raise ValueError(
            f'image_encoder: only "vit" takes converted weights, got {config.image_encoder!r}'
        )
    for encoder in encoders:
        check_named(encoder.settings, config, encoder.checkpoint)
    return config


def _normalisation(args: argparse.Namespace, image: _Encoder) -> Normalisation | None:
    """What the image checkpoint was trained with; None for one channel of which nothing is said."""
    channels = image.named["embeddings.patch_embeddings.projection.weight"].tensor.shape[1]
    known = image.checkpoint.normalisation
    if args.image_mean or args.image_std:
        known = Normalisation(tuple(args.image_mean or ()), tuple(args.image_std or ()))
    elif known is None and channels == 3:
        print(f"image_mean, image_std: {image.checkpoint.source} does not say, ImageNet's assumed")
        known = _IMAGENET
    if known and not len(known.mean) == len(known.std) == channels:
        raise ValueError(
            f"image_mean, image_std: expected {channels} values each, one a channel of "
            f"{image.checkpoint.source}; got {known.mean} and {known.std}"
        )
    return known


def _image_processor(
    config: MpmaConfig, theirs: Normalisation | None, store: Store | None
) -> MpmaImageProcessor:
    """Normalises as the store's images; without a store as the checkpoint's, channels averaged."""
    if store is not None:
        mean, std = store.meta["image_mean"], store.meta["image_std"]
    elif theirs is not None:
        mean, std = fmean(theirs.mean), fmean(theirs.std)
    else:
        return MpmaImageProcessor(config.target_size)
    return MpmaImageProcessor(config.target_size, mean, std)
