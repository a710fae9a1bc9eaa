"""Linear probe of the frozen image encoder with few labels: `mpma evaluate linear`."""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from mpma_train.data.store import Store
from mpma_train.evaluate.features import image_features, load_subject
from mpma_train.evaluate.held_out import label_array, split_rows
from mpma_train.evaluate.probe import (
    DRAWS,
    FRACTIONS,
    aurocs,
    binary_targets,
    has_both_classes,
    probe,
)
from mpma_train.evaluate.results import Numbers, Result

PIXEL_SIDE = 32
SPLITS = ("train", "validate", "test")


def evaluate(args: argparse.Namespace) -> Result:
    """Fit on 1, 10 and 100 % of the labelled training images, measure AUROC on the test split.

    Every image counts, also several of one study. The regularisation is chosen on validate, in the
    same way for every baseline.

    Args:
        args: model, data, split ("test"), seed and batch_size.

    Raises:
        ValueError: as `load_subject`; another split; an empty split; labels that no probe can be
            fitted to.
    """
    if args.split != "test":
        raise ValueError(
            "split: linear fits on train, chooses its regularisation on validate and measures on "
            f"test, got {args.split!r}"
        )
    subject = load_subject(args.model, args.data, batch_size=args.batch_size, seed=args.seed)
    rows, targets, names, left_out = labelled_rows(subject.store)

    def numbers(features: Callable[[np.ndarray], np.ndarray]) -> Numbers:
        splits = [(features(rows[split]), targets[split]) for split in SPLITS]
        return summarise(probe(*splits, seed=args.seed), names)

    constant = aurocs(targets["test"], np.zeros_like(targets["test"]))
    return Result(
        task="linear",
        model=str(args.model),
        data=str(args.data),
        n=len(rows["test"]),
        seed=args.seed,
        metrics=numbers(partial(image_features, subject, subject.model)),
        baselines={
            "chance": summarise(dict.fromkeys(FRACTIONS, constant[None]), names),
            "untrained": numbers(partial(image_features, subject, subject.untrained())),
            "pixels": numbers(partial(pixel_features, subject.store)),
        },
        details={
            "training_images": len(rows["train"]),
            "draws": DRAWS,
            "labels": len(names),
            "labels_left_out": left_out,
        },
    )


def labelled_rows(
    store: Store,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str], list[str]]:
    """Labelled rows of each split, with the targets of every label that can be fitted and scored.

    Returns:
        split -> (n,) rows of the store; split -> (n, L) targets of 1, 0 and NaN; the L names; and
        the names without both a positive and a negative row in train or in test.

    Raises:
        ValueError: a split has no labelled row, or no label is left.
    """
    rows, targets = {}, {}
    for split in SPLITS:
        found = split_rows(store, split)
        of_split = binary_targets(label_array(store, found))
        labelled = ~np.isnan(of_split).all(axis=1)
        if not labelled.any():
            raise ValueError(
                f"data: expected labels in split {split!r}, {store.path} has {len(found)} pairs "
                f"there and none is labelled (labels: {', '.join(store.label_names) or 'none'})"
            )
        rows[split], targets[split] = found[labelled], of_split[labelled]
    usable = has_both_classes(targets["train"]) & has_both_classes(targets["test"])
    names = [name for name, kept in zip(store.label_names, usable, strict=True) if kept]
    left_out = [name for name, kept in zip(store.label_names, usable, strict=True) if not kept]
    if not names:
        raise ValueError(
            f"data: no label of {store.path} has both positive and negative images in train and "
            f"test: {', '.join(left_out)}"
        )
    return rows, {split: t[:, usable] for split, t in targets.items()}, names, left_out


def pixel_features(store: Store, rows: np.ndarray) -> np.ndarray:
    """Grey values of each image averaged down to 32 × 32: (n, 1024) float32 in [0, 1]."""
    size = (PIXEL_SIDE, PIXEL_SIDE)
    small = [
        # As floats: in 8 bits Pillow rounds once for each axis.
        Image.fromarray(store.images[row].astype(np.float32)).resize(size, Image.Resampling.BOX)
        for row in rows
    ]
    return np.stack([np.asarray(image) for image in small]).reshape(len(rows), -1) / 255


def summarise(found: dict[int, np.ndarray], names: list[str]) -> Numbers:
    """Macro AUROC and its deviation over draws, then the mean of every label.

    Args:
        found: percent -> (draws, L) AUROC.
        names: L label names.
    """
    numbers: Numbers = {}
    for percent, areas in found.items():
        macro = areas.mean(axis=1)
        numbers[f"auroc_{percent}"] = float(macro.mean())
        if len(macro) > 1:
            numbers[f"auroc_{percent}_std"] = float(macro.std(ddof=1))
    for percent, areas in found.items():
        for name, area in zip(names, areas.mean(axis=0), strict=True):
            numbers[f"auroc_{percent}/{name}"] = float(area)
    return numbers
