"""Masked reports with the right image and with a wrong one: `mpma evaluate reconstruct`.

Only the difference between the two proves that the fusion uses the image; a language model alone
fills in most words. The image's own reconstruction is measured beside it.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpma_train.evaluate.features import Subject, load_subject
from mpma_train.evaluate.held_out import HeldOut, held_out_pairs, partners
from mpma_train.evaluate.results import Result
from mpma_train.models import MpmaForPreTraining
from mpma_train.models.image_encoder import two_resolutions
from mpma_train.models.masking import PairedMasks, draw_masks
from mpma_train.models.reconstruction import patch_targets

# Training studies that the unigram model and the constant patch are fitted on, at most.
FITTED_STUDIES = 4096


@dataclass(frozen=True)
class Losses:
    """Losses of N held-out pairs, means over the mask draws; float64 (N,), NaN where undefined.

    Attributes:
        report, report_permuted: cross-entropy of the masked tokens, with the right image and
            with another one.
        report_untrained, unigram: the same with the right image, of the untrained model, and of
            the unigram model.
        image, image_untrained, constant: squared error of the masked patches, of the model, of
            the untrained model and of the constant.
    """

    report: np.ndarray
    report_permuted: np.ndarray
    report_untrained: np.ndarray
    unigram: np.ndarray
    image: np.ndarray
    image_untrained: np.ndarray
    constant: np.ndarray


def evaluate(args: argparse.Namespace) -> Result:
    """Held-out losses of both reconstructions, one image a study, dropout off.

    Args:
        args: model, data, split, seed, batch_size and draws.

    Raises:
        ValueError: as `load_subject`; an empty split; a single pair; a model without one of the
            reconstructions; no draw.
    """
    if args.draws < 1:
        raise ValueError(f"draws: expected 1 or more, got {args.draws}")
    subject = load_subject(args.model, args.data, batch_size=args.batch_size, seed=args.seed)
    config = subject.model.config
    if not (config.report_active and config.image_active):
        raise ValueError(
            f"model: {args.model} was trained without reports or images to reconstruct"
        )
    untrained = subject.untrained()
    for measured in (config, untrained.config):
        # On masked tokens whatever the model was trained on; the alignment has no part in it.
        measured.mlm_loss_on = "masked"
        measured.global_loss_weight = measured.local_loss_weight = 0.0
    pairs = held_out_pairs(subject.store, args.split)
    groups = pair_groups(pairs)
    wrong = partners(groups, args.seed)
    losses = measure(subject, untrained, args.split, pairs, wrong, args.draws)
    difference = losses.report_permuted - losses.report
    difference = difference[~np.isnan(difference)]
    return Result(
        task="reconstruct",
        model=str(args.model),
        data=str(args.data),
        n=len(pairs.items),
        seed=args.seed,
        metrics={
            "report_loss": float(np.nanmean(losses.report)),
            "report_loss_permuted": float(np.nanmean(losses.report_permuted)),
            "report_loss_difference": float(difference.mean()),
            "report_loss_difference_se": standard_error(difference),
            "image_loss": float(losses.image.mean()),
        },
        baselines={
            # Every token as likely as any other; for patches the constant is the blind guess.
            "chance": {"report_loss": math.log(config.vocab_size), "report_loss_difference": 0.0},
            "untrained": {
                "report_loss": float(np.nanmean(losses.report_untrained)),
                "image_loss": float(losses.image_untrained.mean()),
            },
            "unigram": {"report_loss": float(np.nanmean(losses.unigram))},
            "constant": {"image_loss": float(losses.constant.mean())},
        },
        details={
            "split": args.split,
            "draws": args.draws,
            "permuted_with_same_findings": int((groups[wrong] == groups).sum()),
            "reports_without_words": int(np.isnan(losses.report).sum()),
        },
    )


def pair_groups(pairs: HeldOut) -> np.ndarray:
    """(N,) int64: the set of findings, or the report's text where nothing is labelled."""
    unlabelled = pairs.finding_ids.max() + 1 + pairs.report_ids
    return np.where(pairs.finding_ids >= 0, pairs.finding_ids, unlabelled)


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of (n,) values; None for fewer than two."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


@torch.no_grad()
def measure(
    subject: Subject,
    untrained: MpmaForPreTraining,
    split: str,
    pairs: HeldOut,
    wrong: np.ndarray,
    draws: int,
) -> Losses:
    """Losses with the right images, with those of `wrong` and untrained, under the same masks.

    Args:
        subject: model and data.
        untrained: the model of the same shape that the subject's is compared with.
        split: name of the split.
        pairs: its N held-out pairs.
        wrong: (N,) number of the pair whose image replaces each pair's own.
        draws: masks drawn for each pair.
    """
    model, config = subject.model, subject.model.config
    log_probability, patch = fit_baselines(subject)
    side = config.patch_size * config.target_scale
    found = []
    for draw in range(draws):
        right_batches = subject.batches(split, pairs.items, draw)
        wrong_batches = subject.batches(split, pairs.items[wrong], draw)
        for batch, other in zip(right_batches, wrong_batches, strict=True):
            masks = masks_of(subject, batch)
            masked = masks.masked_tokens
            right = model(**batch)
            permuted = model(**(batch | {"pixel_values": other["pixel_values"]}))
            fresh = untrained(**batch)
            unigram = (-log_probability[batch["input_ids"]] * masked).sum(1) / masked.sum(1)
            _, target = two_resolutions(batch["pixel_values"], config)
            constant = (patch_targets(target, side, masks.masked_patches) - patch).square()
            nothing = ~masked.any(dim=1)
            reports = (out.report_loss_per_sample for out in (right, permuted, fresh))
            of_batch = (
                *(report.masked_fill(nothing, torch.nan) for report in reports),
                unigram,
                right.image_loss_per_sample,
                fresh.image_loss_per_sample,
                constant.mean(dim=(1, 2)),
            )
            found.append(torch.stack([part.double() for part in of_batch]).cpu())
    means = torch.cat(found, dim=1).unflatten(1, (draws, -1)).mean(dim=1)
    return Losses(*means.numpy())


def masks_of(subject: Subject, batch: dict[str, Tensor]) -> PairedMasks:
    """The masks that the model's forward draws for a batch."""
    model, config = subject.model.model, subject.model.config
    text = (batch["input_ids"], batch["attention_mask"], batch["word_ids"])
    _, word_ids = model.complete_text(*text)
    counts = (config.num_patches, config.num_masked_patches, config.text_mask_ratio)
    return draw_masks(word_ids, *counts, batch["mask_seed"])


def fit_baselines(subject: Subject) -> tuple[Tensor, Tensor]:
    """The unigram model and the constant patch, of the training pairs.

    Returns:
        log-probability (V,) of every token by its count among maskable tokens, add-one smoothed;
        and the mean (q,) of all patches, each normalised as the reconstruction target is.
    """
    config, device = subject.model.config, subject.model.device
    items = held_out_pairs(subject.store, "train").items
    if len(items) > FITTED_STUDIES:
        chosen = np.random.default_rng(subject.seed).choice(len(items), FITTED_STUDIES, False)
        items = items[np.sort(chosen)]
    side = config.patch_size * config.target_scale
    counts = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
    total, patches = torch.zeros((), device=device), 0
    for batch in subject.batches("train", items):
        text = (batch["input_ids"], batch["attention_mask"], batch["word_ids"])
        _, word_ids = subject.model.model.complete_text(*text)
        counts += batch["input_ids"][word_ids >= 0].bincount(minlength=config.vocab_size)
        _, target = two_resolutions(batch["pixel_values"], config)
        every = torch.arange(config.num_patches, device=device).expand(len(target), -1)
        normalised = patch_targets(target, side, every)
        total = total + normalised.sum(dim=(0, 1))
        patches += normalised.shape[0] * normalised.shape[1]
    return unigram_log_probabilities(counts), total / patches


def unigram_log_probabilities(counts: Tensor) -> Tensor:
    """log((count + 1) / (total + V)) of int64 counts (V,): float32 (V,)."""
    return ((counts + 1).double().log() - (counts.sum() + len(counts)).double().log()).float()
