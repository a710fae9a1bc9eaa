"""Reconstruction losses end to end on a tiny model, and its baselines by hand."""

import math

import numpy as np
import pytest
import torch

from mpma_train.evaluate import reconstruct
from mpma_train.evaluate.features import load_subject
from mpma_train.evaluate.held_out import HeldOut, held_out_pairs
from mpma_train.evaluate.reconstruct import (
    fit_baselines,
    masks_of,
    measure,
    pair_groups,
    standard_error,
    unigram_log_probabilities,
)
from mpma_train.models import modeling_mpma


@pytest.fixture
def subject(model_path, store_path):
    return load_subject(str(model_path), str(store_path), batch_size=6, seed=0)


def test_result_has_the_agreed_names_and_repeats(arguments):
    result = reconstruct.evaluate(arguments())
    names = {"report_loss", "report_loss_permuted", "report_loss_difference"}
    assert set(result.metrics) == names | {"report_loss_difference_se", "image_loss"}
    assert set(result.baselines["unigram"]) == {"report_loss"}
    assert set(result.baselines["constant"]) == {"image_loss"}
    difference = result.metrics["report_loss_permuted"] - result.metrics["report_loss"]
    assert result.metrics["report_loss_difference"] == pytest.approx(difference)
    assert result.metrics["report_loss_difference_se"] > 0
    assert result.details["permuted_with_same_findings"] == 0
    assert reconstruct.evaluate(arguments()) == result  # dropout is off, masks are seeded
    assert reconstruct.evaluate(arguments(seed=1)).metrics != result.metrics


def test_untrained_model_knows_no_words_and_the_constant_nearly_none(arguments):
    result = reconstruct.evaluate(arguments())
    # fresh weights are nearly uniform over the vocabulary; small logits add half their variance
    assert result.metrics["report_loss"] > result.baselines["unigram"]["report_loss"]
    # a patch of n pixels has unbiased variance 1: its mean square is (n - 1) / n
    assert result.baselines["constant"]["image_loss"] == pytest.approx(255 / 256, abs=0.05)


def test_masks_are_those_of_the_forward(subject, monkeypatch):
    drawn = []

    def spy(*args):
        drawn.append(draw_masks(*args))
        return drawn[-1]

    draw_masks = modeling_mpma.draw_masks
    monkeypatch.setattr(modeling_mpma, "draw_masks", spy)
    seen = []
    for draw in (0, 1):
        batch = next(subject.batches("test", draw=draw))
        subject.model(**batch)
        masks = masks_of(subject, batch)
        assert torch.equal(masks.masked_tokens, drawn[-1].masked_tokens)
        assert torch.equal(masks.masked_patches, drawn[-1].masked_patches)
        seen.append(masks.masked_patches)
    assert not torch.equal(*seen)


def test_own_image_as_partner_makes_no_difference(subject):
    pairs = held_out_pairs(subject.store, "test")
    same = measure(subject, "test", pairs, np.arange(len(pairs.items)), draws=1)
    np.testing.assert_array_equal(same.report, same.report_permuted)
    other = measure(subject, "test", pairs, np.roll(np.arange(len(pairs.items)), 1), draws=1)
    np.testing.assert_array_equal(same.report, other.report)
    assert (other.report != other.report_permuted).any()


def test_batch_size_does_not_change_the_losses(model_path, store_path):
    losses = []
    for batch_size in (3, 16):
        subject = load_subject(str(model_path), str(store_path), batch_size=batch_size, seed=0)
        pairs = held_out_pairs(subject.store, "test")
        losses.append(measure(subject, "test", pairs, np.arange(16)[::-1], draws=2))
    for name in ("report", "report_permuted", "unigram", "image", "constant"):
        # float32 sums of another order
        np.testing.assert_allclose(*(getattr(loss, name) for loss in losses), rtol=1e-4)


def test_unigram_is_smoothed_and_normalised():
    log_probability = unigram_log_probabilities(torch.tensor([3, 0, 1]))
    expected = [math.log(4 / 7), math.log(1 / 7), math.log(2 / 7)]
    np.testing.assert_allclose(log_probability.numpy(), expected, rtol=1e-6)


def test_baselines_are_fitted_on_training_pairs(subject):
    log_probability, patch = fit_baselines(subject)
    assert log_probability.exp().sum() == pytest.approx(1, abs=1e-5)
    tokenizer = subject.store.tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "[PAD]", "study", "edema"])
    special, padding, study, edema = log_probability[ids].tolist()
    assert special == padding  # never a target: only smoothing
    assert special < edema < study
    items = held_out_pairs(subject.store, "train").items
    images = subject.store.images[subject.store.rows("train")[items]].astype(np.float64)
    patches = images.reshape(-1, 4, 16, 4, 16).swapaxes(2, 3).reshape(-1, 256)
    normal = (patches - patches.mean(1, keepdims=True)) / patches.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(patch.numpy(), normal.mean(0), atol=1e-4)


def test_unigram_loss_is_over_masked_tokens(subject):
    pairs = held_out_pairs(subject.store, "test")
    losses = measure(subject, "test", pairs, np.arange(16), draws=1)
    log_probability, _ = fit_baselines(subject)
    batch = next(subject.batches("test", pairs.items))
    masks = masks_of(subject, batch)
    own = batch["input_ids"][0][masks.masked_tokens[0]]
    assert losses.unigram[0] == pytest.approx(-log_probability[own].mean().item(), rel=1e-5)


def test_model_trained_on_all_tokens_is_measured_on_masked_ones(tmp_path, arguments, save_model):
    path = save_model(tmp_path / "m", mlm_loss_on="all")
    found = reconstruct.evaluate(arguments(model=str(path)))
    assert found.metrics == reconstruct.evaluate(arguments()).metrics


def test_unlabelled_pairs_are_grouped_by_their_text():
    ids = np.array([0, 0, 1, 2])
    pairs = HeldOut(np.arange(4), ids, np.array([5, 5, -1, -1]), np.array(list("abcd")))
    groups = pair_groups(pairs)
    assert groups[0] == groups[1]
    assert len(set(groups.tolist())) == 3


def test_standard_error_by_hand():
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(np.array([1.0])) is None


def test_what_cannot_be_measured_is_an_error(tmp_path, arguments, save_model):
    with pytest.raises(ValueError, match="draws: expected 1 or more, got 0"):
        reconstruct.evaluate(arguments(draws=0))
    path = save_model(tmp_path / "m", report_loss_weight=0)
    with pytest.raises(ValueError, match="trained without reports or images to reconstruct"):
        reconstruct.evaluate(arguments(model=str(path)))
