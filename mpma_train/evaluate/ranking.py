"""Retrieval metrics on a matrix of scores, in NumPy: exact expectations, so ties never flatter.

Every value is an expectation over a random order of tied candidates. A constant score therefore
gives exactly chance, and a score that is 1 for equal finding names and 0 otherwise gives exactly
what an oracle that knows only those names reaches.
"""

from typing import NamedTuple

import numpy as np

RECALL_AT = (1, 5, 10)
PRECISION_AT = 5


class FirstHit(NamedTuple):
    """What decides the rank of each query's best hit; three (Q,) int64 arrays."""

    above: np.ndarray  # candidates that score higher than the best hit
    tied: np.ndarray  # candidates that score the same, the hit itself included
    tied_hits: np.ndarray  # hits among the tied


def first_hit(
    scores: np.ndarray, hits: np.ndarray, candidates: np.ndarray | None = None
) -> FirstHit:
    """Place of the best-scored hit of each query.

    Args:
        scores: (Q, N) float, higher is better.
        hits: (Q, N) bool; each query needs at least one hit among its candidates.
        candidates: (Q, N) bool, all by default.

    Raises:
        ValueError: shapes differ, a score is NaN, or a query has no hit.
    """
    candidates = np.ones_like(hits) if candidates is None else candidates
    for name, array in (("hits", hits), ("candidates", candidates)):
        if array.shape != scores.shape:
            raise ValueError(
                f"{name}: expected the scores' shape {scores.shape}, got {array.shape}"
            )
    if np.isnan(scores).any():
        raise ValueError(f"scores: {np.isnan(scores).sum()} of {scores.size} are NaN")
    hits = hits & candidates
    if not hits.any(axis=1).all():
        raise ValueError(f"hits: {(~hits.any(axis=1)).sum()} queries have no hit to find")
    best = np.where(hits, scores, -np.inf).max(axis=1, keepdims=True)
    above, tied = (scores > best) & candidates, (scores == best) & candidates
    return FirstHit(above.sum(1), tied.sum(1), (tied & hits).sum(1))


def recall_at(k: int, place: FirstHit) -> np.ndarray:
    """Probability that a hit is among the first k, ties in random order: (Q,) float64.

    The k - above free places are drawn from the tied without replacement: one minus the
    hypergeometric probability that none of them is a hit.
    """
    free = np.clip(k - place.above, 0, place.tied)
    miss = np.ones(len(free))
    for drawn in range(int(free.max(initial=0))):
        left = np.maximum(place.tied - drawn, 1)
        misses_left = np.maximum(place.tied - place.tied_hits - drawn, 0)
        miss *= np.where(drawn < free, misses_left / left, 1.0)
    return np.where(free > 0, 1.0 - miss, 0.0)


def expected_rank(place: FirstHit) -> np.ndarray:
    """Expected rank of the first hit, counted from 1: (Q,) float64."""
    return place.above + (place.tied + 1) / (place.tied_hits + 1)


def precision_at(k: int, scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Expected share of relevant candidates among the first k (or all, if fewer): (Q,) float64."""
    k = min(k, scores.shape[1])
    threshold = np.partition(scores, -k, axis=1)[:, -k, None]
    above, tied = scores > threshold, scores == threshold
    share_of_tied = (relevant & tied).sum(1) / tied.sum(1)
    return ((relevant & above).sum(1) + (k - above.sum(1)) * share_of_tied) / k


def retrieval_values(
    image_to_report: np.ndarray,
    report_to_image: np.ndarray,
    report_ids: np.ndarray,
    finding_ids: np.ndarray,
) -> dict[str, np.ndarray]:
    """Every retrieval metric of every query, NaN where the query does not count.

    Args:
        image_to_report: (N, N) score of image i (row) for report j (column).
        report_to_image: (N, N) score of report i (row) for image j (column).
        report_ids: (N,) int, equal for identical report texts: all of them are hits.
        finding_ids: (N,) int, equal for the same set of finding names, -1 for unlabelled pairs.

    Returns:
        name -> (N,) float64. `class_p@5` counts a report with the query's set of findings as
        relevant, the query's own among them; `same_findings_r@1` ranks image to report among the
        pairs with the query's set of findings, for queries with at least two such candidates.
    """
    same_report = report_ids[:, None] == report_ids[None, :]
    same_findings = same_finding_names(finding_ids)
    values: dict[str, np.ndarray] = {}
    for direction, scores in (("i2r", image_to_report), ("r2i", report_to_image)):
        place = first_hit(scores, same_report)
        values |= {f"{direction}_r@{k}": recall_at(k, place) for k in RECALL_AT}
        values[f"{direction}_mean_rank"] = expected_rank(place)

    labelled = finding_ids >= 0
    precision = precision_at(PRECISION_AT, image_to_report, same_findings)
    values[f"class_p@{PRECISION_AT}"] = np.where(labelled, precision, np.nan)

    counts = same_findings.sum(1) >= 2
    among = np.full(len(report_ids), np.nan)
    if counts.any():
        rows = (image_to_report[counts], same_report[counts], same_findings[counts])
        among[counts] = recall_at(1, first_hit(*rows))
    values["same_findings_r@1"] = among
    return values


def same_finding_names(finding_ids: np.ndarray) -> np.ndarray:
    """(N, N) bool: both labelled, with the same set of findings."""
    return (finding_ids[:, None] == finding_ids[None, :]) & (finding_ids >= 0)[:, None]


def means(values: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Mean over the queries that count; None where no query does."""
    return {
        name: None if np.isnan(value).all() else float(np.nanmean(value))
        for name, value in values.items()
    }


def bootstrap_intervals(
    values: dict[str, np.ndarray], patients: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float] | None]:
    """95 % percentile intervals of the means, resampling patients and not queries.

    A patient's studies resemble each other: drawing them together keeps the interval honest. The
    candidates stay those of the whole split.

    Args:
        values: name -> (N,) per-query values, NaN where a query does not count.
        patients: (N,) patient of each query.

    Returns:
        name -> [lower, upper], None where no query counts.
    """
    _, patient = np.unique(patients, return_inverse=True)
    count = int(patient.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    intervals: dict[str, list[float] | None] = {}
    for name, value in values.items():
        counts = ~np.isnan(value)
        if not counts.any():
            intervals[name] = None
            continue
        total = np.bincount(patient, np.where(counts, value, 0.0), count)
        queries = drawn @ np.bincount(patient, counts, count)
        some = queries > 0  # a resample may miss every query that counts
        mean = (drawn @ total)[some] / queries[some]
        intervals[name] = [float(x) for x in np.percentile(mean, (2.5, 97.5))]
    return intervals
