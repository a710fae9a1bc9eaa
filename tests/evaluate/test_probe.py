"""Labels, draws and fits of the linear probe."""

import numpy as np
import pytest
import torch

from mpma_train.evaluate import probe as module
from mpma_train.evaluate.probe import (
    DRAWS,
    FRACTIONS,
    STRENGTHS,
    aurocs,
    binary_targets,
    draw_rows,
    fit_scores,
    has_both_classes,
    probe,
)


def test_targets_follow_the_benchmarks_convention():
    nan = np.nan
    labels = np.array([[1, 0, -1, nan], [nan, nan, nan, nan], [nan, 1, 0, 0]])
    expected = [[1, 0, nan, 0], [nan, nan, nan, nan], [0, 1, 0, 0]]
    np.testing.assert_array_equal(binary_targets(labels), expected)
    with pytest.raises(ValueError, match=r"expected 1, 0, -1 or NaN, got 2\.0"):
        binary_targets(np.array([[2.0]]))


def rare_targets():
    targets = np.zeros((400, 3), dtype=np.float32)
    targets[7, 0] = 1  # one positive in 400
    targets[:, 1] = 1
    targets[[11, 12], 1] = 0  # two negatives
    targets[::2, 2] = np.nan
    targets[1::4, 2] = 1
    return targets


def test_draws_keep_both_classes_of_every_label():
    targets = rare_targets()
    for seed in range(20):
        rows = draw_rows(targets, 1, seed)
        assert len(rows) == len(set(rows)) == 4
        assert has_both_classes(targets[rows]).all()
        assert 7 in rows
    assert len(draw_rows(targets, 10, 0)) == 40
    np.testing.assert_array_equal(draw_rows(targets, 100, 0), np.arange(400))


def test_draws_are_decided_by_the_seed_and_otherwise_even():
    targets = rare_targets()
    np.testing.assert_array_equal(draw_rows(targets, 10, 3), draw_rows(targets, 10, 3))
    assert set(draw_rows(targets, 10, 3)) != set(draw_rows(targets, 10, 4))
    counts = np.bincount(np.concatenate([draw_rows(targets, 10, s) for s in range(300)]))
    common = np.delete(counts, [7, 11, 12])
    # binomial(300, 0.1): mean 30, deviation 5.2; five deviations over 400 rows
    assert 4 <= common.min()
    assert common.max() <= 56


def test_draw_grows_rather_than_lose_a_label():
    targets = np.eye(6, dtype=np.float32)  # six labels, each positive in its own row
    assert len(draw_rows(targets, 1, 0)) == 6


def test_draw_names_labels_without_both_classes():
    targets = np.array([[1, 0], [1, 1]], dtype=np.float32)
    with pytest.raises(ValueError, match=r"labels \[0\] have no positive or no negative"):
        draw_rows(targets, 100, 0)


def test_auroc_by_hand_leaves_out_uncertain_rows():
    targets = np.array([[1, 1], [0, 1], [1, 1], [np.nan, 1], [0, 1]])
    scores = np.array([[0.9, 0], [0.8, 0], [0.3, 0], [-9.0, 0], [0.1, 0]])
    areas = aurocs(targets, scores)
    assert areas[0] == pytest.approx(3 / 4)  # of four pairs only (0.3, 0.8) is in the wrong order
    assert np.isnan(areas[1])


def separable(n, seed, *, signal):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 6)).astype(np.float32)
    targets = (features[:, :2] + 0.3 * rng.normal(size=(n, 2)) > 0.5).astype(np.float32)
    return features if signal else rng.normal(size=(n, 6)).astype(np.float32), targets


def standard_error(area, targets):
    """Of an AUROC: Hanley and McNeil, Radiology 143 (1982)."""
    positive = targets.sum(axis=0)
    negative = len(targets) - positive
    of_positive, of_negative = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    spread = (positive - 1) * of_positive + (negative - 1) * of_negative
    return np.sqrt((area * (1 - area) + spread) / (positive * negative))


@pytest.mark.parametrize("signal", [True, False])
def test_probe_finds_signal_and_nothing_else(signal):
    splits = [separable(n, seed, signal=signal) for seed, n in enumerate((600, 200, 400))]
    found = probe(*splits, seed=0)
    assert [found[p].shape for p in FRACTIONS] == [(3, 2), (3, 2), (1, 2)]
    features, targets = splits[2]
    if signal:
        # no score ranks better than the feature that decided the label
        best = aurocs(targets, features[:, :2])
        assert (best - found[100] < standard_error(best, targets)).all()
        assert found[1].mean() < found[10].mean() < found[100].mean()
    else:
        chance = np.full(2, 0.5)
        assert (abs(found[100] - chance) < 4 * standard_error(chance, targets)).all()
    again = probe(*splits, seed=0)
    assert all((found[p] == again[p]).all() for p in FRACTIONS)


def test_strength_is_chosen_on_validate_and_the_weakest_model_wins_ties(monkeypatch):
    train, validate, test = (separable(n, n, signal=True) for n in (60, 40, 50))

    def fitted(_, strength, *features):
        """Perfect on validate with two strengths, of which only the weaker is so on test."""
        perfect = {"validate": (1e-2, 1e-1), "test": (1e-2,)}
        signs = [1 if strength in perfect[split] else -1 for split in ("validate", "test")]
        return [sign * targets for sign, (_, targets) in zip(signs, (validate, test), strict=True)]

    monkeypatch.setattr(module, "fit_scores", fitted)
    found = probe(train, validate, test, seed=0)
    assert all((areas == 1).all() for areas in found.values())


def test_each_draw_is_fitted_on_its_rows_in_units_of_the_training_images(monkeypatch):
    train, validate, test = (separable(n, n, signal=True) for n in (600, 40, 50))
    calls = []

    def spy(train, strength, *features):
        calls.append((train[0], train[1], *features))
        return fit_scores(train, strength, *features)

    monkeypatch.setattr(module, "fit_scores", spy)
    probe(train, validate, test, seed=5)
    scaled = [(x - train[0].mean(0)) / train[0].std(0) for x, _ in (train, validate, test)]
    rows = [draw_rows(train[1], p, 5 + d) for p in (1, 10) for d in range(DRAWS)]
    rows.append(np.arange(600))
    assert len(calls) == len(rows) * len(STRENGTHS)
    for call, drawn in zip(calls[:: len(STRENGTHS)], rows, strict=True):
        expected = (scaled[0][drawn], train[1][drawn], *scaled[1:])
        torch.testing.assert_close(call, expected)  # float32's tolerance


def test_probe_does_not_depend_on_feature_scale():
    plain = [separable(n, seed, signal=True) for seed, n in enumerate((60, 100, 100))]
    scaled = [(x * np.float32(1024) + np.float32(8), y) for x, y in plain]
    # an AUROC is of ranks alone, which the rounding of float32 does not touch here
    np.testing.assert_array_equal(probe(*plain, seed=0)[100], probe(*scaled, seed=0)[100])


def test_probe_refuses_splits_it_cannot_score():
    train, validate, test = (separable(n, n, signal=True) for n in (60, 40, 50))
    with pytest.raises(ValueError, match="validate: no label has both"):
        probe(train, (validate[0], np.zeros((40, 2), np.float32)), test, seed=0)
    with pytest.raises(ValueError, match="test: a label has no positive or no negative"):
        probe(train, validate, (test[0], np.zeros((50, 2), np.float32)), seed=0)
