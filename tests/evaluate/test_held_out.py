"""Which pairs are measured, and which count as equal."""

import numpy as np
import pytest

from mpma_train.evaluate.held_out import finding_ids, held_out_pairs, partners


def test_finding_ids_compare_sets_of_positive_labels():
    nan = np.nan
    labels = np.array(
        [[1, nan, 0], [1, 0, nan], [1, 1, nan], [nan, nan, nan], [0, -1, nan], [nan, nan, 0]]
    )
    ids = finding_ids(labels)
    assert ids[0] == ids[1]  # negative and not mentioned are both no finding
    assert ids[4] == ids[5]  # uncertain is no positive finding
    assert ids[3] == -1
    assert len({ids[0], ids[2], ids[4]}) == 3
    np.testing.assert_array_equal(finding_ids(np.empty((2, 0))), [-1, -1])


@pytest.mark.parametrize(
    ("sizes", "inside"),
    [
        ([3, 3], 0),
        ([2, 5, 1, 2], 0),
        ([6, 2, 1], 3),  # six of nine: three must stay inside
        ([4], 4),
        ([1, 1], 0),
    ],
)
def test_partners_leave_their_group_wherever_possible(sizes, inside):
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    chosen = partners(groups, seed=0)
    np.testing.assert_array_equal(np.sort(chosen), np.arange(len(groups)))
    assert (chosen != np.arange(len(groups))).all()
    assert (groups[chosen] == groups).sum() == inside


def test_partners_are_decided_by_the_seed():
    groups = np.arange(20) // 2
    np.testing.assert_array_equal(partners(groups, 3), partners(groups, 3))
    assert (partners(groups, 3) != partners(groups, 4)).any()
    with pytest.raises(ValueError, match="at least 2 to exchange images, got 1"):
        partners(np.array([0]), 0)


def test_one_image_a_study_the_first_by_identifier(store):
    pairs = held_out_pairs(store, "test")
    assert len(pairs.items) == 16
    rows = store.pairs.iloc[store.rows("test")[pairs.items]]
    assert rows["study_id"].is_monotonic_increasing
    first = store.pairs[store.pairs["split"] == "test"].groupby("study_id")["image_id"].min()
    assert rows["image_id"].tolist() == first.tolist()
    assert "test-019" in rows["image_id"].tolist()  # written second, sorted first
    assert pairs.patients.tolist() == rows["patient_id"].tolist()


def test_identical_reports_are_counted(store):
    pairs = held_out_pairs(store, "test")
    assert pairs.duplicates == 2
    reports = store.pairs.iloc[store.rows("test")[pairs.items]]["report"].tolist()
    same = np.array(reports)[:, None] == np.array(reports)[None]
    np.testing.assert_array_equal(pairs.report_ids[:, None] == pairs.report_ids[None], same)
