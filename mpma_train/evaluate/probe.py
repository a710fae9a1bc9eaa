"""Logistic regression on frozen features with few labels: draws, fits, AUROC."""

import math

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

FRACTIONS = (1, 10, 100)  # percent of the labelled training rows
DRAWS = 3
# inverse strength of the L2 penalty, as scikit-learn names it
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)

Split = tuple[np.ndarray, np.ndarray]  # features (N, D), targets (N, L)


def binary_targets(labels: np.ndarray) -> np.ndarray:
    """Targets of a probe from CheXpert-style labels.

    Positive is 1; negative and not mentioned are 0, the convention of the CheXpert benchmarks;
    uncertain (-1) is NaN, left out of fitting and scoring. A row without any label was never
    labelled and is NaN throughout.

    Args:
        labels: (N, L) float of 1, 0, -1 and NaN.

    Returns:
        (N, L) float32 of 1, 0 and NaN.

    Raises:
        ValueError: a label is none of these.
    """
    known = np.isin(labels, (-1, 0, 1)) | np.isnan(labels)
    if not known.all():
        raise ValueError(f"labels: expected 1, 0, -1 or NaN, got {labels[~known][0]}")
    targets = np.where(labels == 1, 1.0, np.where(labels == -1, np.nan, 0.0))
    targets[np.isnan(labels).all(axis=1)] = np.nan
    return targets.astype(np.float32)


def has_both_classes(targets: np.ndarray) -> np.ndarray:
    """(L,) bool: the label has a positive and a negative row in (N, L) targets."""
    return (targets == 1).any(axis=0) & (targets == 0).any(axis=0)


def draw_rows(targets: np.ndarray, percent: int, seed: int) -> np.ndarray:
    """Rows of a labelled fraction in which every label keeps a positive and a negative.

    One row is taken for each class of each label that still lacks it, rarest class first; the
    rest follows at random. The draw grows beyond the fraction only if those rows alone are more.

    Args:
        targets: (N, L) of 1, 0 and NaN; every label has both classes.
        percent: of the N rows, rounded up.
        seed: decides the draw.

    Returns:
        sorted (n,) int64 row numbers.

    Raises:
        ValueError: a label has no positive or no negative row at all.
    """
    if not has_both_classes(targets).all():
        lacking = np.flatnonzero(~has_both_classes(targets)).tolist()
        raise ValueError(f"targets: labels {lacking} have no positive or no negative row")
    order = np.random.default_rng(seed).permutation(len(targets))
    classes = np.concatenate([targets == 1, targets == 0], axis=1)[order]  # (N, 2L) in drawn order
    taken = np.zeros(len(targets), dtype=bool)
    for column in classes[:, np.argsort(classes.sum(axis=0), kind="stable")].T:
        if not (column & taken).any():
            taken[np.flatnonzero(column)[0]] = True
    wanted = math.ceil(len(targets) * percent / 100)
    missing = max(wanted - int(taken.sum()), 0)
    taken[np.flatnonzero(~taken)[:missing]] = True
    return np.sort(order[taken])


def aurocs(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each label: (L,) float64, NaN where a class is absent."""
    areas = np.full(targets.shape[1], np.nan)
    for label in np.flatnonzero(has_both_classes(targets)):
        rows = ~np.isnan(targets[:, label])
        areas[label] = roc_auc_score(targets[rows, label], scores[rows, label])
    return areas


def fit_scores(train: Split, strength: float, *features: np.ndarray) -> list[np.ndarray]:
    """Decision values (N, L) for each array of features, one regression a label."""
    inputs, targets = train
    scores = [np.empty((len(x), targets.shape[1])) for x in features]
    for label in range(targets.shape[1]):
        rows = ~np.isnan(targets[:, label])
        # The same minimum either way; Newton needs few steps, cheap where rows outnumber columns.
        solver = "newton-cholesky" if rows.sum() > inputs.shape[1] else "lbfgs"
        probe = LogisticRegression(C=strength, max_iter=2000, solver=solver)
        probe.fit(inputs[rows], targets[rows, label].astype(int))
        for out, x in zip(scores, features, strict=True):
            out[:, label] = probe.decision_function(x)
    return scores


def probe(train: Split, validate: Split, test: Split, seed: int) -> dict[int, np.ndarray]:
    """Test AUROC of every label for each fraction of the training labels.

    Features are standardised with the training images' mean and deviation, which uses no label.
    For each draw the one strength with the best macro AUROC on validate is kept, the weakest model
    winning ties. Three draws a fraction; at 100 % they would be the same, so there is one.

    Returns:
        percent -> (draws, L) float64.

    Raises:
        ValueError: no label has both classes in validate, or a label lacks one in test.
    """
    if not has_both_classes(validate[1]).any():
        raise ValueError("validate: no label has both a positive and a negative row")
    if not has_both_classes(test[1]).all():
        raise ValueError("test: a label has no positive or no negative row")
    scaler = StandardScaler().fit(train[0])
    train_x, validate_x, test_x = (scaler.transform(x) for x, _ in (train, validate, test))
    found = {}
    for percent in FRACTIONS:
        draws = []
        for draw in range(1 if percent == 100 else DRAWS):
            rows = draw_rows(train[1], percent, seed + draw)
            best = (-1.0, np.empty(0))
            for strength in STRENGTHS:
                fitted = (train_x[rows], train[1][rows])
                on_validate, on_test = fit_scores(fitted, strength, validate_x, test_x)
                macro = float(np.nanmean(aurocs(validate[1], on_validate)))
                if macro > best[0]:
                    best = (macro, aurocs(test[1], on_test))
            draws.append(best[1])
        found[percent] = np.stack(draws)
    return found
