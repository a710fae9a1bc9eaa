"""`mpma embed`: the features of a split, for use outside of this package."""

import argparse
from pathlib import Path

import numpy as np
import torch

from mpma_train.data.names import SPLITS
from mpma_train.evaluate.features import load_subject
from mpma_train.output_paths import require_writable_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mpma embed`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--data", required=True, metavar="DIR", help="prepared store")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--batch-size", type=int, default=64)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Write image_id, study_id and float32 arrays with one row an image of the split.

    `image_features` (N, D) and `report_features` (N, Dt) are the pooled states of the encoders;
    `image_embeds` and `report_embeds` (N, projection_size) their L2-normalised projections, whose
    product ranks pairs; they are left out where the model has no global alignment. Nothing is
    masked.

    Raises:
        ValueError, OSError: a model, a store or a file that cannot be used.
    """
    if args.out.suffix != ".npz":
        raise ValueError(f"out: expected a file name that ends in .npz, got {args.out}")
    require_writable_file("out", args.out)
    subject = load_subject(args.model, args.data, batch_size=args.batch_size, seed=0)
    columns: dict[str, list[np.ndarray]] = {}
    for batch in subject.batches(args.split):
        image = subject.model.get_image_features(batch["pixel_values"])
        text = {name: batch[name] for name in ("input_ids", "attention_mask", "word_ids")}
        report = subject.model.get_text_features(**text)
        for kind, features in (("image", image), ("report", report)):
            parts = {"features": features.pooler_output, "embeds": features.embeds}
            for name, values in parts.items():
                if values is not None:
                    columns.setdefault(f"{kind}_{name}", []).append(values.float().cpu().numpy())
    pairs = subject.store.pairs.iloc[subject.store.rows(args.split)]
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    identifiers = {name: pairs[name].to_numpy(str) for name in ("image_id", "study_id")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **identifiers, **arrays)
    print(f"{args.out}: {len(pairs)} pairs of {args.split}, {', '.join(arrays)}")
    return 0
