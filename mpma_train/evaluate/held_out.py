"""The held-out pairs of a split: one image a study, with what counts as equal."""

from dataclasses import dataclass

import numpy as np

from mpma_train.data.store import Store


@dataclass(frozen=True)
class HeldOut:
    """N pairs of a split, one of each study.

    Attributes:
        items: (N,) int64 positions in the split, in the order of the study identifiers.
        report_ids: (N,) int64, equal for identical texts.
        finding_ids: (N,) int64, equal for the same set of positive labels, -1 for unlabelled pairs.
        patients: (N,) patient identifiers.
    """

    items: np.ndarray
    report_ids: np.ndarray
    finding_ids: np.ndarray
    patients: np.ndarray

    @property
    def duplicates(self) -> int:
        """Pairs whose report text stands in another pair too."""
        counts = np.bincount(self.report_ids)
        return int(counts[counts > 1].sum())


def held_out_pairs(store: Store, split: str) -> HeldOut:
    """One pair of each study of a split: the first image by sorted image_id.

    Raises:
        ValueError: the split is empty.
    """
    rows = split_rows(store, split)
    pairs = store.pairs.iloc[rows].assign(item=range(len(rows)))
    pairs = pairs.sort_values(["study_id", "image_id"]).drop_duplicates("study_id")
    items = pairs["item"].to_numpy(np.int64)
    return HeldOut(
        items=items,
        report_ids=np.unique(pairs["report"].to_numpy(str), return_inverse=True)[1],
        finding_ids=finding_ids(label_array(store, rows[items])),
        patients=pairs["patient_id"].to_numpy(str),
    )


def split_rows(store: Store, split: str) -> np.ndarray:
    """Row numbers of a split.

    Raises:
        ValueError: there are none; names the splits that have some.
    """
    rows = store.rows(split)
    if len(rows) == 0:
        counts = store.pairs["split"].value_counts().to_dict()
        raise ValueError(f"split: expected one with pairs, got {split!r}; the store has {counts}")
    return rows


def label_array(store: Store, rows: np.ndarray) -> np.ndarray:
    """(n, L) float32 labels of rows: 1, 0, -1 uncertain, NaN not mentioned."""
    columns = [f"label/{name}" for name in store.label_names]
    return store.pairs[columns].iloc[rows].to_numpy(np.float32)


def finding_ids(labels: np.ndarray) -> np.ndarray:
    """Number of each row's set of positive labels, -1 where no label is given at all.

    Args:
        labels: (N, L) of 1, 0, -1 and NaN.

    Returns:
        (N,) int64.
    """
    labelled = ~np.isnan(labels).all(axis=1)
    numbers = np.full(len(labels), -1, dtype=np.int64)
    if labelled.any():
        positive = labels[labelled] == 1
        numbers[labelled] = np.unique(positive, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers


def partners(groups: np.ndarray, seed: int) -> np.ndarray:
    """For each pair another one, of another group wherever possible; each is used once.

    Pairs sorted by group and moved on by the size of the largest group all land outside their own,
    unless one group holds more than half; then as few as possible stay inside, none on itself.

    Args:
        groups: (N,) int, N at least 2.
        seed: decides the order within groups and of equally large groups.

    Returns:
        (N,) int64 permutation.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(groups) < 2:
        raise ValueError(f"pairs: expected at least 2 to exchange images, got {len(groups)}")
    order = np.random.default_rng(seed).permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    largest = int(np.unique(groups, return_counts=True)[1].max())
    shift = largest if largest < len(groups) else 1
    permuted = np.empty_like(order)
    permuted[order] = np.roll(order, -shift)
    return permuted
