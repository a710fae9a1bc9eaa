"""Ranking metrics against hand-computed values and brute-force enumeration."""

from itertools import pairwise, permutations

import numpy as np
import pytest

from mpma_train.evaluate.ranking import (
    bootstrap_intervals,
    expected_rank,
    first_hit,
    means,
    precision_at,
    recall_at,
    retrieval_values,
    same_finding_names,
)


def enumerate_orders(scores, hits, candidates, k):
    """Recall at k and rank of the first hit, averaged over every order of equal scores."""
    chosen = np.flatnonzero(candidates)
    ranks = []
    for order in permutations(chosen):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            ranks.append(1 + next(i for i, j in enumerate(order) if hits[j]))
    return np.mean([rank <= k for rank in ranks]), np.mean(ranks)


def test_recall_and_rank_without_ties():
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.2, 0.3, 0.1]])
    place = first_hit(scores, np.eye(3, dtype=bool))
    np.testing.assert_array_equal(expected_rank(place), [1, 3, 3])
    np.testing.assert_array_equal(recall_at(1, place), [1, 0, 0])
    np.testing.assert_array_equal(recall_at(3, place), [1, 1, 1])


def test_recall_and_rank_equal_every_order_of_ties():
    rng = np.random.default_rng(0)
    for _ in range(40):  # 6 candidates at 3 levels: ties above, at and below the hit
        scores = rng.integers(0, 3, (1, 6)).astype(float)
        hits = rng.random((1, 6)) < 0.4
        candidates = rng.random((1, 6)) < 0.8
        if not (hits & candidates).any():
            continue
        place = first_hit(scores, hits, candidates)
        for k in (1, 2, 5):
            recall, rank = enumerate_orders(scores[0], hits[0], candidates[0], k)
            assert recall_at(k, place)[0] == pytest.approx(recall, abs=1e-12)
            assert expected_rank(place)[0] == pytest.approx(rank, abs=1e-12)


def test_constant_score_is_chance():
    n = 8
    values = retrieval_values(np.zeros((n, n)), np.zeros((n, n)), np.arange(n), np.arange(n) // 4)
    found = means(values)
    assert found["i2r_r@1"] == found["r2i_r@1"] == pytest.approx(1 / 8)
    assert found["i2r_r@5"] == pytest.approx(5 / 8)
    assert found["i2r_r@10"] == 1.0  # only eight candidates
    assert found["i2r_mean_rank"] == pytest.approx(4.5)
    assert found["class_p@5"] == pytest.approx(0.5)
    assert found["same_findings_r@1"] == pytest.approx(1 / 4)


def test_duplicate_reports_are_hits_and_raise_chance():
    n = 6
    report_ids = np.array([0, 0, 0, 1, 2, 3])
    found = means(
        retrieval_values(np.zeros((n, n)), np.zeros((n, n)), report_ids, np.zeros(n, int))
    )
    assert found["i2r_r@1"] == pytest.approx((3 * 3 / 6 + 3 * 1 / 6) / 6)
    assert found["same_findings_r@1"] == pytest.approx(found["i2r_r@1"])
    scores = np.eye(n)
    scores[0] = scores[1] = [0, 0, 1, 0, 0, 0]  # the wrong pair, with the right text
    assert means(retrieval_values(scores, scores, report_ids, np.zeros(n, int)))["i2r_r@1"] == 1.0


def test_names_oracle_equals_enumeration():
    finding_ids = np.array([0, 0, 0, 1, 1, 2, -1])
    n = len(finding_ids)
    report_ids = np.array([0, 1, 1, 2, 3, 4, 5])  # one text twice
    knows = same_finding_names(finding_ids).astype(float)
    values = retrieval_values(knows, knows, report_ids, finding_ids)
    same = report_ids[:, None] == report_ids[None]
    for query in range(n):
        for k in (1, 5):
            recall, _ = enumerate_orders(knows[query], same[query], np.ones(n, bool), k)
            assert values[f"i2r_r@{k}"][query] == pytest.approx(recall, abs=1e-12)
    assert values["i2r_r@1"][3] == pytest.approx(1 / 2)
    assert values["i2r_r@1"][6] == pytest.approx(1 / 7)  # unlabelled: knows nothing


def test_same_findings_needs_two_candidates_and_labels():
    finding_ids = np.array([0, 0, 1, -1, -1])
    scores = np.eye(5)
    scores[0] = [0.2, 0.1, 0.9, 0.9, 0.9]  # better ones have other findings
    among = retrieval_values(scores, scores, np.arange(5), finding_ids)["same_findings_r@1"]
    np.testing.assert_array_equal(among, [1, 1, np.nan, np.nan, np.nan])


def test_directions_use_their_own_scores():
    right, wrong = np.eye(3), 1 - np.eye(3)
    found = means(retrieval_values(right, wrong, np.arange(3), np.zeros(3, int)))
    assert found["i2r_r@1"] == 1.0
    assert found["r2i_r@1"] == 0.0


def test_precision_by_hand_and_with_ties():
    relevant = np.array([[True, False, True, False]])
    assert precision_at(2, np.array([[4.0, 3.0, 2.0, 1.0]]), relevant) == 0.5
    # first place sure and relevant, second drawn from three of which one is relevant
    assert precision_at(2, np.array([[4.0, 3.0, 3.0, 3.0]]), relevant) == pytest.approx(2 / 3)
    assert precision_at(9, np.array([[4.0, 3.0, 2.0, 1.0]]), relevant) == 0.5


def test_unlabelled_split_leaves_class_metrics_unmeasured():
    values = retrieval_values(np.eye(3), np.eye(3), np.arange(3), np.full(3, -1))
    found = means(values)
    assert found["class_p@5"] is None
    assert found["same_findings_r@1"] is None
    intervals = bootstrap_intervals(values, np.arange(3), resamples=10)
    assert intervals["class_p@5"] is None


def test_bad_scores_raise():
    eye = np.eye(2, dtype=bool)
    with pytest.raises(ValueError, match="1 of 4 are NaN"):
        first_hit(np.array([[np.nan, 0], [0, 1]]), eye)
    with pytest.raises(
        ValueError, match=r"hits: expected the scores' shape \(2, 2\), got \(3, 3\)"
    ):
        first_hit(np.eye(2), np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="1 queries have no hit"):
        first_hit(np.eye(2), np.array([[True, False], [False, False]]))


def test_bootstrap_resamples_patients():
    rng = np.random.default_rng(0)
    patient_value = rng.random(50)
    patients = np.repeat(np.arange(50), 8)
    values = {"r": np.repeat(patient_value, 8)}
    by_patient = bootstrap_intervals(values, patients)["r"]
    by_query = bootstrap_intervals(values, np.arange(400))["r"]
    # Eight equal studies a patient: the interval is that of 50 draws, sqrt(8) times as wide. An end
    # of 1000 resamples has a standard error of sqrt(.025 * .975 / 1000) / density(1.96) = 0.085
    # deviations; 15 % of the width, 3.92 deviations, is five times that of the difference of two.
    expected = 2 * 1.96 * patient_value.std() / np.sqrt(50)
    assert by_patient[1] - by_patient[0] == pytest.approx(expected, rel=0.15)
    assert by_query[1] - by_query[0] == pytest.approx(expected / np.sqrt(8), rel=0.15)
    assert by_patient[0] < patient_value.mean() < by_patient[1]
    assert by_patient == bootstrap_intervals(values, patients)["r"]
    assert by_patient != bootstrap_intervals(values, patients, seed=1)["r"]


def test_bootstrap_ignores_queries_that_do_not_count():
    values = {"a": np.array([1.0, np.nan, 0.0, np.nan])}
    lower, upper = bootstrap_intervals(values, np.array(["p", "p", "q", "r"]))["a"]
    assert (lower, upper) == (0.0, 1.0)
    constant = {"a": np.array([0.25, np.nan, 0.25])}
    assert bootstrap_intervals(constant, np.arange(3))["a"] == [0.25, 0.25]
