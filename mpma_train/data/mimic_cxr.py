"""Reads MIMIC-CXR-JPG as it is published, with the free-text reports of MIMIC-CXR.

IMAGES/files/p10/p10000032/s50414267/<dicom_id>.jpg
IMAGES/mimic-cxr-2.0.0-{metadata,split,chexpert}.csv[.gz]      (any version number)
REPORTS/files/p10/p10000032/s50414267.txt                      a directory, or mimic-cxr-reports.zip
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .manifest import Manifest, check_split, decode_text
from .names import CHEXPERT_LABELS, LABEL_PREFIX, SPLITS
from .sections import clean, extract
from .tables import label_values, read_table

MAX_REPORT_BYTES = 1 << 20
VIEW_OF_MEANING = {"postero-anterior": "PA", "antero-posterior": "AP"}
DATA_USE = (
    "MIMIC-CXR is credentialed: its data use agreement forbids sharing the data, and what is "
    "derived from it (this store, its tokenizer, models trained on it) must be handled accordingly."
)
_COLUMNS = {
    "metadata": ("dicom_id", "subject_id", "study_id", "ViewPosition"),
    "split": ("dicom_id", "split"),
    "chexpert": ("study_id",),
    "sections": ("study", "impression", "findings"),
}

# Gives a study's report as (text, rules), or the reason why there is none.
ReportSource = Callable[[str, str], tuple[str, tuple[str, ...]] | str]


def read_mimic_cxr(
    images: Path | str, reports: Path | str | None, *, sections: Path | str | None = None
) -> Manifest:
    """Joins the published tables and takes the reports' sections.

    Args:
        images: directory with `files/` and the three tables.
        reports: directory or ZIP archive of the free-text reports; members are read in place.
        sections: a `mimic_cxr_sectioned.csv`, used instead of `reports`.

    Raises:
        FileNotFoundError: a directory, table or archive is missing.
        ValueError: a table lacks a needed column, a label cell holds no label, or an image or a
            patient is in two splits.
    """
    images, manifest = Path(images), Manifest(data_use=DATA_USE)
    metadata = _table(_find_table(images, "metadata"), "metadata", manifest)
    split_of = _read_split(_find_table(images, "split"), manifest)
    labels = _read_labels(_find_table(images, "chexpert"), manifest)
    if sections is not None:
        source = _sectioned(Path(sections), manifest)
    elif reports is not None:
        source = _free_text(Path(reports))
    else:
        raise ValueError("reports: expected a directory or ZIP of reports, or a sections file")
    rows = _select(metadata, split_of, images, manifest)
    rows = _attach_reports(rows, source, manifest)
    if foreign := manifest.rules["not_utf8"]:
        manifest.warnings.append(f"{foreign} reports are not UTF-8: they were read as Latin-1")
    manifest.rows = _attach_labels(rows, labels, manifest)
    check_split(manifest.rows)
    return manifest


def _table(path: Path, name: str, manifest: Manifest) -> pd.DataFrame:
    return read_table(path, _COLUMNS[name], manifest.warnings)


def _find_table(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"images: {folder} is not a directory")
    for pattern in (f"mimic-cxr-*-{name}.csv", f"mimic-cxr-*-{name}.csv.gz"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder}: expected one {name} table, found {names}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder}: expected a table mimic-cxr-*-{name}.csv or .csv.gz")


def _image_path(images: Path, subject: str, study: str, dicom: str) -> Path:
    return images / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg"


def _read_split(path: Path, manifest: Manifest) -> dict[str, str]:
    """The split of every image; a row may come twice, but not with another split."""
    table = _table(path, "split", manifest).drop_duplicates(["dicom_id", "split"])
    crossing = table["dicom_id"][table["dicom_id"].duplicated()]
    if len(crossing):
        raise ValueError(
            f"{path.name}: {len(crossing)} images are in more than one split, the first is "
            f"{crossing.iloc[0]}: expected one split an image"
        )
    return dict(zip(table["dicom_id"], table["split"], strict=True))


def _read_labels(path: Path, manifest: Manifest) -> pd.DataFrame:
    """float32 columns label/<Name>, one row a study, with study_id as the index."""
    table = _table(path, "chexpert", manifest).set_index("study_id")
    there = [name for name in CHEXPERT_LABELS if name in table.columns]
    if absent := [name for name in CHEXPERT_LABELS if name not in there]:
        manifest.warnings.append(
            f"{path.name} has no column {', '.join(absent)}: these labels are blank in every study"
        )
    values = {name: label_values(table[name], path) for name in there}
    every = pd.DataFrame(values, table.index, columns=CHEXPERT_LABELS, dtype="float32")
    labels = _first_rows(every, path, manifest)
    manifest.counts["duplicate_label_rows"] = len(every) - len(labels)
    return labels.add_prefix(LABEL_PREFIX)


def _first_rows(table: pd.DataFrame, path: Path, manifest: Manifest) -> pd.DataFrame:
    """The first row of each study, which is the index, and a warning where there are more."""
    repeated = table.index.duplicated()
    if repeated.any():
        manifest.warnings.append(
            f"{path.name} has {repeated.sum()} rows of studies that it holds already: "
            "the first row of a study counts"
        )
    return table[~repeated]


def _select(
    metadata: pd.DataFrame, split_of: dict[str, str], images: Path, manifest: Manifest
) -> pd.DataFrame:
    """Frontal images with a split, one row each."""
    meanings = metadata.get("ViewCodeSequence_CodeMeaning", pd.Series("", index=metadata.index))
    kept, seen = [], set()
    columns = (metadata[name] for name in _COLUMNS["metadata"])
    for dicom, subject, study, view, meaning in zip(*columns, meanings, strict=True):
        view, meaning = view.strip().upper(), meaning.strip().lower()
        if not view:
            view = VIEW_OF_MEANING.get(meaning, meaning)
            manifest.counts["views_from_code_meaning"] += view in ("PA", "AP")
        if view not in ("PA", "AP"):
            manifest.filtered[view or "no view"] += 1
            continue
        path = str(_image_path(images, subject, study, dicom))
        if dicom in seen:
            manifest.skip(dicom, path, "duplicate row of the metadata table")
            continue
        seen.add(dicom)
        part = split_of.get(dicom, "")
        if part not in SPLITS:
            reason = (
                f"split {part!r}, expected {', '.join(SPLITS)}"
                if part
                else "no row in the split table"
            )
            manifest.skip(dicom, path, reason)
            continue
        kept.append((dicom, study, subject, view, part, path))
    names = ["image_id", "study_id", "patient_id", "view", "split", "path"]
    return pd.DataFrame(kept, columns=names, dtype=object)


def _attach_reports(rows: pd.DataFrame, source: ReportSource, manifest: Manifest) -> pd.DataFrame:
    reports: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for study, subject in dict(zip(rows["study_id"], rows["patient_id"], strict=True)).items():
        found = source(subject, study)
        if isinstance(found, str):
            reasons[study] = found
            continue
        text, rules = found
        manifest.rules.update(rules)
        if text:
            reports[study] = text
        else:
            reasons[study] = "empty report"
    for image, study, path in zip(rows["image_id"], rows["study_id"], rows["path"], strict=True):
        if study in reasons:
            manifest.skip(image, path, reasons[study])
    rows = rows[rows["study_id"].isin(reports)].reset_index(drop=True)
    return rows.assign(report=rows["study_id"].map(reports))


def _attach_labels(rows: pd.DataFrame, labels: pd.DataFrame, manifest: Manifest) -> pd.DataFrame:
    without = int((~rows["study_id"].drop_duplicates().isin(labels.index)).sum())
    manifest.counts["studies_without_labels"] = without
    if without:
        manifest.warnings.append(
            f"{without} studies have no row in the chexpert table: their labels are blank"
        )
    return rows.join(labels, on="study_id")


def _sectioned(path: Path, manifest: Manifest) -> ReportSource:
    table = _table(path, "sections", manifest).set_index("study")
    by_study = _first_rows(table, path, manifest).to_dict("index")

    def source(subject: str, study: str):
        row = by_study.get(f"s{study}")
        if row is None:
            return "no row in the sections file"
        parts = {name: clean(row.get(name, "")) for name in ("impression", "findings")}
        kept = {name: text for name, text in parts.items() if text}
        if kept:
            return " ".join(kept.values()), ("_".join(kept),)
        last = clean(row.get("last_paragraph", ""))
        return last, ("last_paragraph" if last else "empty",)

    return source


def _free_text(path: Path) -> ReportSource:
    read = _from_zip(path) if path.is_file() else _from_folder(path)

    def source(subject: str, study: str):
        content = read(subject, study)
        if isinstance(content, str):
            return content
        text, foreign = decode_text(content)
        found = extract(text)
        return found.text, found.rules + (("not_utf8",) if foreign else ())

    return source


def _from_folder(path: Path) -> Callable[[str, str], bytes | str]:
    if not path.is_dir():
        raise FileNotFoundError(f"reports: {path} is neither a directory nor a ZIP archive")
    root = path / "files" if (path / "files").is_dir() else path

    def read(subject: str, study: str):
        file = root / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
        try:
            if file.stat().st_size > MAX_REPORT_BYTES:
                return f"report larger than {MAX_REPORT_BYTES} bytes"
            return file.read_bytes()
        except OSError as error:
            return f"missing or unreadable report ({error.strerror})"

    return read


def _from_zip(path: Path) -> Callable[[str, str], bytes | str]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"reports: {path} is not a ZIP archive ({error})") from None
    # Members are found by the end of their names and read in place: no name ever becomes a path.
    members = {"/".join(info.filename.split("/")[-2:]): info for info in archive.infolist()}

    def read(subject: str, study: str):
        info = members.get(f"p{subject}/s{study}.txt")
        if info is None:
            return "no report in the archive"
        if info.file_size > MAX_REPORT_BYTES:
            return f"report larger than {MAX_REPORT_BYTES} bytes"
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            return f"unreadable report in the archive ({error})"

    return read
