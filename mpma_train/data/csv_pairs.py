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
from .names import CHEXPERT_LABELS, LABEL_PREFIX, SPLITS
from .sections import extract
from .tables import label_values, read_table

COLUMNS = ("image_path", "report_content", "patient_id", "study_id", "split", "view", "labels")
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validate", "valid": "validate"}


def read_csv_pairs(path: Path | str, *, seed: int = 0) -> Manifest:
    """Reads a CSV of pairs; image paths are relative to the CSV's folder.

    Without a column `split`, patients are dealt 80/10/10 with `seed`; without a patient identifier,
    studies or images are, and a warning says so; another says which columns are not used. Reports
    with section headers are cut to impression and findings.

    Raises FileNotFoundError, or ValueError for a missing column, a label cell that is no label, or
    a patient in two splits.
    """
    path = Path(path)
    manifest = Manifest()
    table = read_table(path, ("image_path", "report_content"), manifest.warnings)
    rows = _select(table, path, manifest)
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
    unused = [column for column in table.columns if column not in COLUMNS and not _label(column)]
    if unused:
        manifest.warnings.append(
            f"{path.name}: not used: column {', '.join(unused)}; a column of labels is called "
            f"{LABEL_PREFIX}<Name> or by a CheXpert name"
        )
    if "split" not in table.columns:
        rows["split"] = split_by_patient(rows["patient_id"], seed)
    check_split(rows)
    manifest.rows = rows
    return manifest


def _select(table: pd.DataFrame, path: Path, manifest: Manifest) -> pd.DataFrame:
    labels = _labels(table, path)
    kept, numbers, seen = [], [], set()
    for number, row in enumerate(table.to_dict("records")):
        image = row["image_path"].strip()
        if not image:
            manifest.skip(f"line {number + 2}", "", "blank image_path")
            continue
        where = str(path.parent / image)
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


def _label(column: str) -> str:
    """The name of the label that a column holds, "" for another column."""
    name = column.removeprefix(LABEL_PREFIX)
    return name if name != column or name in CHEXPERT_LABELS else ""


def _labels(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """float32 columns label/<Name>, one row a row of the table."""
    numbered = table.set_axis(pd.RangeIndex(1, len(table) + 1, name="row"))
    columns: dict[str, np.ndarray] = {}
    if "labels" in table.columns:
        named = [{part.strip() for part in cell.split("|")} - {""} for cell in table["labels"]]
        for name in sorted(set().union(*named)):
            columns[name] = np.array([name in row for row in named], dtype=np.float32)
    for column in table.columns:
        if name := _label(column):
            columns[name] = label_values(numbered[column], path)
    return pd.DataFrame(
        {LABEL_PREFIX + name: column for name, column in columns.items()}, table.index
    )
