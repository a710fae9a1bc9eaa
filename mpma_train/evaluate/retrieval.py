"""Retrieval between held-out images and reports: `mpma evaluate retrieval`."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mpma_train.evaluate.features import load_subject
from mpma_train.evaluate.held_out import held_out_pairs
from mpma_train.evaluate.ranking import (
    bootstrap_intervals,
    means,
    retrieval_values,
    same_finding_names,
)
from mpma_train.evaluate.results import Result
from mpma_train.models import MpmaConfig, MpmaForPreTraining
from mpma_train.models.alignment import local_similarity

# Scores of this many images with as many reports are held at once.
_CHUNK = 128


@dataclass(frozen=True)
class Embeddings:
    """Projected features of N pairs; what the model was built without is None.

    Attributes:
        image, text: (N, d), L2-normalised.
        patches: (N, P, d).
        tokens, token_mask: (N, T, d) and bool (N, T), True = aligned.
    """

    image: Tensor | None
    text: Tensor | None
    patches: Tensor | None
    tokens: Tensor | None
    token_mask: Tensor | None


def evaluate(args: argparse.Namespace) -> Result:
    """Rank every held-out report for every image and the reverse, one image a study.

    Args:
        args: model, data, split, seed, batch_size and score.

    Raises:
        ValueError: as `load_subject`; an empty split; a score the model was trained without.
    """
    subject = load_subject(args.model, args.data, batch_size=args.batch_size, seed=args.seed)
    score = choose_score(subject.model.config, args.score)
    pairs = held_out_pairs(subject.store, args.split)

    def values_of(image_to_report: np.ndarray, report_to_image: np.ndarray) -> dict:
        identities = (pairs.report_ids, pairs.finding_ids)
        return retrieval_values(image_to_report, report_to_image, *identities)

    def values_of_model(model: MpmaForPreTraining) -> dict:
        embedded = embed(model, subject.batches(args.split, pairs.items))
        return values_of(*similarities(model, embedded, score))

    found = values_of_model(subject.model)
    nothing = np.zeros((len(pairs.items), len(pairs.items)))
    names = same_finding_names(pairs.finding_ids).astype(float)
    return Result(
        task="retrieval",
        model=str(args.model),
        data=str(args.data),
        n=len(pairs.items),
        seed=args.seed,
        metrics=means(found),
        baselines={
            "chance": means(values_of(nothing, nothing)),
            "untrained": means(values_of_model(subject.untrained())),
            "names_oracle": means(values_of(names, names)),
        },
        intervals=bootstrap_intervals(found, pairs.patients, seed=args.seed),
        details={
            "split": args.split,
            "score": score,
            "duplicate_reports": pairs.duplicates,
            "finding_sets": len(set(pairs.finding_ids[pairs.finding_ids >= 0].tolist())),
            "unlabelled": int((pairs.finding_ids < 0).sum()),
            "same_findings_queries": int((~np.isnan(found["same_findings_r@1"])).sum()),
        },
    )


def choose_score(config: MpmaConfig, wanted: str | None) -> str:
    """The similarity that was asked for, or all that the model was trained with.

    Raises:
        ValueError: the model was trained without it, or without any alignment.
    """
    trained = {"global": config.global_active, "local": config.local_active}
    trained["both"] = all(trained.values())
    if not any(trained.values()):
        raise ValueError("model: trained without alignment, so it has no score to rank by")
    if wanted is None:
        return "both" if trained["both"] else "global" if trained["global"] else "local"
    if not trained[wanted]:
        known = [name for name, there in trained.items() if there]
        raise ValueError(f"score: expected one the model was trained with {known}, got {wanted!r}")
    return wanted


@torch.no_grad()
def embed(model: MpmaForPreTraining, batches: Iterator[dict[str, Tensor]]) -> Embeddings:
    """Features of whole images and whole reports, none of them masked."""
    images, texts = [], []
    for batch in batches:
        images.append(model.get_image_features(batch["pixel_values"]))
        report = {name: batch[name] for name in ("input_ids", "attention_mask", "word_ids")}
        texts.append(model.get_text_features(**report))
    whole, parts = model.config.global_active, model.config.local_active
    return Embeddings(
        image=torch.cat([i.embeds for i in images]) if whole else None,
        text=torch.cat([t.embeds for t in texts]) if whole else None,
        patches=torch.cat([i.local_embeds for i in images]) if parts else None,
        tokens=_join([t.local_embeds for t in texts]) if parts else None,
        token_mask=_join([t.local_mask for t in texts]) if parts else None,
    )


def _join(batches: list[Tensor]) -> Tensor:
    """Batches (B, T, ...) of several lengths as one (N, longest, ...), zero beyond their own."""
    return pad_sequence([report for batch in batches for report in batch], batch_first=True)


@torch.no_grad()
def similarities(
    model: MpmaForPreTraining, embedded: Embeddings, score: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the alignment losses, summed where the score is "both".

    Returns:
        float64 (N, N) of images (rows) for reports, and of reports (rows) for images.
    """
    image_rows = report_rows = 0.0
    if score != "local":
        scale = model.model.alignment.temperature_scale()
        image_rows = scale * embedded.image @ embedded.text.T
        report_rows = image_rows.T
    if score != "global":
        reports_by_image, images_by_report = _local(model.config, embedded)
        image_rows = image_rows + model.config.local_scale * reports_by_image
        report_rows = report_rows + model.config.local_scale * images_by_report
    return image_rows.double().cpu().numpy(), report_rows.double().cpu().numpy()


def _local(config: MpmaConfig, embedded: Embeddings) -> tuple[Tensor, Tensor]:
    """Local similarities (images, reports) and (reports, images), a chunk of each at a time."""
    image_rows, report_rows = [], []
    for patches in embedded.patches.split(_CHUNK):
        chunks = zip(embedded.tokens.split(_CHUNK), embedded.token_mask.split(_CHUNK), strict=True)
        both = [local_similarity(config, tokens, patches, mask) for tokens, mask in chunks]
        report_rows.append(torch.cat([to_images for to_images, _ in both]))
        image_rows.append(torch.cat([to_reports for _, to_reports in both]).T)
    return torch.cat(image_rows), torch.cat(report_rows, dim=1)
