"""What a reader hands to the preparation: a row an image, what was left out and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .names import SPLITS

SPLIT_SHARES = (0.8, 0.1, 0.1)


@dataclass
class Manifest:
    """The outcome of reading a data set's tables and reports, before any image is decoded.

    Attributes:
        rows: columns image_id, study_id, patient_id, view, split, path, report, label/<Name>.
        skipped: (image_id, path, reason) of each row that was left out.
        filtered: counts of rows outside the selection (lateral views ...); these are no errors.
        rules: how often each rule of the section extractor was used, over reports.
        counts: further counts for meta.json.
        warnings: what the user must be told loudly.
        data_use: a note on the data's terms, "" if none is known.
    """

    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    filtered: Counter = field(default_factory=Counter)
    rules: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    data_use: str = ""

    def skip(self, image_id: str, path: str, reason: str) -> None:
        """Records one row as left out."""
        self.skipped.append((image_id, path, reason))


def decode_text(content: bytes) -> tuple[str, bool]:
    """Decodes a report, UTF-8 or else Latin-1; the second value is True where UTF-8 failed."""
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("latin-1"), True


def split_by_patient(patients: pd.Series, seed: int) -> pd.Series:
    """Deals patients to train, validate and test, 80/10/10 by number of patients.

    The same seed and set of patients give the same split, in whatever order the rows come.
    """
    names = np.array(sorted(patients.unique()), dtype=object)
    order = np.random.default_rng(seed).permutation(len(names))
    held = max(round(SPLIT_SHARES[1] * len(names)), 1 if len(names) > 2 else 0)
    bounds = (len(names) - 2 * held, len(names) - held)
    dealt = np.array(SPLITS, dtype=object)[np.searchsorted(bounds, np.argsort(order), side="right")]
    return patients.map(dict(zip(names, dealt, strict=True)))


def check_split(rows: pd.DataFrame) -> None:
    """Raises ValueError if a patient is in more than one split."""
    crossing = rows.groupby("patient_id")["split"].nunique()
    number = int((crossing > 1).sum())
    if number:
        raise ValueError(
            f"{number} of {len(crossing)} patients are in more than one split: "
            "expected a split by patient"
        )
