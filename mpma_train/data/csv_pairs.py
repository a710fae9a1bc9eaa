"""Reads pairs from one CSV file.

Columns: image_path, report_content [, patient_id, study_id, split, view, labels].

Labels stand either in a column `labels` (names parted by `|`; what is not named counts as negative)
or in columns of their own, called `label/<Name>` or by a CheXpert name, with 1, 0, -1 or blank.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from .manifest import Manifest, check_split, split_by_patient
from .mimic_cxr import read_table
from .names import CHEXPERT_LABELS, LABEL_PREFIX, SPLITS
from .sections import extract

SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validate", "valid": "validate"}


def read_csv_pairs(path: Path | str, *, seed: int = 0) -> Manifest:
    """Reads a CSV of pairs; image paths are relative to the CSV's folder.

    Without a column `split`, patients are dealt 80/10/10 with `seed`; without a patient identifier,
    studies or images are, and a warning says so. Reports with section headers are cut to impression
    and findings.

    Raises FileNotFoundError, or ValueError for a missing column or a patient in two splits.
    """
    path = Path(path)
    table = read_table(path, ("image_path", "report_content"))
    manifest = Manifest()
    rows = _select(table, path.parent, manifest)
    if "patient_id" not in table.columns:
        manifest.warnings.append(
            f"{path.name} has no column patient_id: "
            "images of one patient may fall into train and test, and test results may be too good"
        )
    elif blank := int((table["patient_id"].str.strip() == "").sum()):
        manifest.warnings.append(
            f"{blank} rows of {path.name} have a blank patient_id: "
            "their patients may be in more than one split, and test results may be too good"
        )
    if "split" not in table.columns:
        rows["split"] = split_by_patient(rows["patient_id"], seed)
    check_split(rows)
    manifest.rows = rows
    return manifest


def _select(table: pd.DataFrame, folder: Path, manifest: Manifest) -> pd.DataFrame:
    labels = _labels(table)
    kept, numbers, seen = [], [], set()
    for number, row in enumerate(table.to_dict("records")):
        image = row["image_path"].strip()
        if not image:
            manifest.skip(f"line {number + 2}", "", "blank image_path")
            continue
        where = str(folder / image)
        if image in seen:
            manifest.skip(image, where, "duplicate row: the image is listed twice")
            continue
        seen.add(image)
        report = extract(row["report_content"], whole_text=True)
        manifest.rules.update(report.rules)
        if not report.text:
            manifest.skip(image, where, "empty report")
            continue
        given = row.get("split", "").strip().lower()
        if "split" in row and given not in SPLIT_NAMES:
            manifest.skip(image, where, f"split {given!r}, expected {', '.join(SPLITS)}")
            continue
        study = row.get("study_id", "").strip() or image
        kept.append(
            {
                "image_id": image,
                "study_id": study,
                "patient_id": row.get("patient_id", "").strip() or study,
                "view": row.get("view", "").strip(),
                "split": SPLIT_NAMES.get(given, ""),
                "path": where,
                "report": report.text,
            }
        )
        numbers.append(number)
    names = ["image_id", "study_id", "patient_id", "view", "split", "path", "report"]
    rows = pd.DataFrame(kept, columns=names, dtype=object)
    return pd.concat([rows, labels.iloc[numbers].reset_index(drop=True)], axis=1)


def _numbers(cells: pd.Series) -> np.ndarray:
    """1, 0 and -1 as float32, blank as NaN; ValueError names the first cell that is none."""
    blank = cells.isna() | (cells.astype(str).str.strip() == "")
    numbers = pd.to_numeric(cells.where(~blank), errors="coerce")
    wrong = ~blank & ~numbers.isin((1, 0, -1))
    if wrong.any():
        place = int(wrong.to_numpy().argmax())
        raise ValueError(
            f"column {cells.name!r}, row {place + 1}: a label must be 1 (positive), 0 (negative), "
            f"-1 (uncertain) or blank (not mentioned), got {cells.iloc[place]!r}"
        )
    return numbers.to_numpy(dtype=np.float32)


def _labels(table: pd.DataFrame) -> pd.DataFrame:
    """float32 columns label/<Name>, one row a row of the table."""
    columns: dict[str, np.ndarray] = {}
    if "labels" in table.columns:
        named = [{part.strip() for part in cell.split("|")} - {""} for cell in table["labels"]]
        for name in sorted(set().union(*named)):
            columns[name] = np.array([name in row for row in named], dtype=np.float32)
    for column in table.columns:
        name = column.removeprefix(LABEL_PREFIX)
        if name != column or name in CHEXPERT_LABELS:
            columns[name] = _numbers(table[column])
    return pd.DataFrame(
        {LABEL_PREFIX + name: column for name, column in columns.items()}, table.index
    )
