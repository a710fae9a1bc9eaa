"""Reconstruction losses end to end on a tiny model, and its baselines by hand."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from mpma_train.evaluate import reconstruct
from mpma_train.evaluate.features import Subject, load_subject
from mpma_train.evaluate.held_out import HeldOut, held_out_pairs
from mpma_train.evaluate.reconstruct import (
    Losses,
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


def test_result_has_the_agreed_names_and_repeats(arguments, store):
    result = reconstruct.evaluate(arguments())
    names = {"report_loss", "report_loss_permuted", "report_loss_difference"}
    assert set(result.metrics) == names | {"report_loss_difference_se", "image_loss"}
    assert set(result.baselines) == {"chance", "untrained", "unigram", "constant"}
    assert set(result.baselines["unigram"]) == {"report_loss"}
    assert set(result.baselines["constant"]) == {"image_loss"}
    uniform = math.log(len(store.tokenizer()))
    assert result.baselines["chance"] == {"report_loss": uniform, "report_loss_difference": 0}
    assert result.details["permuted_with_same_findings"] == 0
    assert reconstruct.evaluate(arguments()) == result  # dropout is off, masks are seeded
    assert reconstruct.evaluate(arguments(seed=1)).metrics != result.metrics


@pytest.mark.parametrize("seed", [0, 1])
def test_untrained_model_is_measured_as_the_model_is(tmp_path, arguments, save_model, seed):
    path = save_model(tmp_path / "m", seed=seed)
    result = reconstruct.evaluate(arguments(model=str(path)))
    untrained = result.baselines["untrained"]
    assert set(untrained) == {"report_loss", "image_loss"}
    # the baseline's seed is that of the evaluation, 0
    assert [untrained[name] == result.metrics[name] for name in untrained] == [seed == 0] * 2


def test_metrics_of_known_losses(arguments, monkeypatch):
    """Means over the reports that have words, and the paired difference with its error."""
    nan = np.nan
    known = Losses(
        report=np.array([1.0, 2.0, nan, 3.0]),
        report_permuted=np.array([1.5, 4.0, nan, 6.5]),
        report_untrained=np.array([5.0, 6.0, nan, 7.0]),
        unigram=np.array([4.0, 4.0, nan, 1.0]),
        image=np.array([1.0, 2.0, 3.0, 4.0]),
        image_untrained=np.array([2.0, 2.0, 2.0, 4.0]),
        constant=np.array([1.0, 1.0, 1.0, 2.0]),
    )
    monkeypatch.setattr(reconstruct, "measure", lambda *_: known)
    result = reconstruct.evaluate(arguments())
    assert result.metrics == {
        "report_loss": 2.0,
        "report_loss_permuted": 4.0,
        "report_loss_difference": 2.0,  # of 0.5, 2 and 3.5
        "report_loss_difference_se": pytest.approx(1.5 / 3**0.5),
        "image_loss": 2.5,
    }
    assert result.baselines["untrained"] == {"report_loss": 6.0, "image_loss": 2.5}
    assert result.baselines["unigram"] == {"report_loss": 3.0}
    assert result.baselines["constant"] == {"image_loss": 1.25}
    assert result.details["reports_without_words"] == 1


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
    untrained, own = subject.untrained(), np.arange(len(pairs.items))
    same = measure(subject, untrained, "test", pairs, own, draws=1)
    np.testing.assert_array_equal(same.report, same.report_permuted)
    other = measure(subject, untrained, "test", pairs, np.roll(own, 1), draws=1)
    np.testing.assert_array_equal(same.report, other.report)
    assert (other.report != other.report_permuted).any()


def test_batch_size_does_not_change_the_losses(model_path, store_path):
    losses = []
    for batch_size in (3, 16):
        subject = load_subject(str(model_path), str(store_path), batch_size=batch_size, seed=0)
        pairs = held_out_pairs(subject.store, "test")
        wrong = np.arange(16)[::-1]
        losses.append(measure(subject, subject.untrained(), "test", pairs, wrong, draws=2))
    for name in (field.name for field in fields(Losses)):
        # float32 sums of another order, kept as float64
        few, many = (getattr(loss, name).astype(np.float32) for loss in losses)
        torch.testing.assert_close(few, many)


def test_unigram_is_smoothed_and_normalised():
    log_probability = unigram_log_probabilities(torch.tensor([3, 0, 1]))
    expected = [math.log(4 / 7), math.log(1 / 7), math.log(2 / 7)]
    torch.testing.assert_close(log_probability, torch.tensor(expected))


def test_baselines_are_fitted_on_training_pairs(subject):
    log_probability, patch = fit_baselines(subject)
    torch.testing.assert_close(log_probability.exp().sum(), torch.tensor(1.0))
    tokenizer = subject.store.tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "[PAD]", "study", "edema"])
    special, padding, study, edema = log_probability[ids].tolist()
    assert special == padding  # never a target: only smoothing
    assert special < edema < study
    items = held_out_pairs(subject.store, "train").items
    images = subject.store.images[subject.store.rows("train")[items]].astype(np.float64)
    patches = (images.reshape(-1, 4, 16, 4, 16).swapaxes(2, 3).reshape(-1, 256) / 255 - 0.2) / 0.2
    torch.testing.assert_close(patch, torch.from_numpy(normalised(patches).mean(0)).float())


def normalised(patches):
    """Patches (..., n) in float64 as the reconstruction's target defines them."""
    deviation = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    return (patches - patches.mean(-1, keepdims=True)) / deviation


def test_baselines_are_measured_on_what_is_masked_in_every_draw(subject):
    pairs = held_out_pairs(subject.store, "test")
    losses = measure(subject, subject.untrained(), "test", pairs, np.arange(16), draws=2)
    log_probability, patch = fit_baselines(subject)
    unigram, constant = [], []
    for draw in (0, 1):
        batch = next(subject.batches("test", pairs.items, draw))
        masks = masks_of(subject, batch)
        unigram.append(-log_probability[batch["input_ids"][0][masks.masked_tokens[0]]].mean())
        image = batch["pixel_values"][0, 0].double().numpy()
        patches = normalised(image.reshape(4, 16, 4, 16).swapaxes(1, 2).reshape(16, 256))
        constant.append(np.square(patches - patch.numpy())[masks.masked_patches[0]].mean())
    for found, draws in ((losses.unigram, unigram), (losses.constant, constant)):
        torch.testing.assert_close(np.float32(found[0]), np.float32(np.mean(draws)))


def test_report_without_words_has_no_loss(subject):
    pairs = held_out_pairs(subject.store, "test")
    subject.store.pairs.loc[subject.store.rows("test")[pairs.items[3]], "report"] = ""
    losses = measure(subject, subject.untrained(), "test", pairs, np.arange(16), draws=1)
    for name in ("report", "report_permuted", "report_untrained", "unigram"):
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(getattr(losses, name))), [3])
    assert np.isfinite(losses.image).all()


def test_large_training_sets_are_sampled_without_repetition(subject, monkeypatch):
    studies = held_out_pairs(subject.store, "train").items
    monkeypatch.setattr(reconstruct, "FITTED_STUDIES", len(studies) - 1)
    given = []
    batches = Subject.batches

    def spy(self, split, items):
        given.append((split, items.tolist()))
        return batches(self, split, items)

    monkeypatch.setattr(Subject, "batches", spy)
    fit_baselines(subject)
    ((split, items),) = given
    assert split == "train"
    assert len(set(items)) == len(items) == len(studies) - 1
    assert set(items) < set(studies.tolist())


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
