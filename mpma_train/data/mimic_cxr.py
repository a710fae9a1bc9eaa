"""Reads MIMIC-CXR-JPG as it is published, with the free-text reports of MIMIC-CXR.

IMAGES/files/p10/p10000032/s50414267/<dicom_id>.jpg
IMAGES/mimic-cxr-2.0.0-{metadata,split,chexpert}.csv[.gz]      (any version number)
REPORTS/files/p10/p10000032/s50414267.txt                      a directory, or mimic-cxr-reports.zip
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .manifest import Manifest, check_split, decode_text
from .names import CHEXPERT_LABELS, LABEL_PREFIX, SPLITS
from .sections import clean, extract

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
    "sections": ("study",),
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
        ValueError: a table lacks a needed column, or a patient is in two splits.
    """
    images = Path(images)
    metadata = read_table(_find_table(images, "metadata"), _COLUMNS["metadata"])
    split = read_table(_find_table(images, "split"), _COLUMNS["split"])
    labels = read_table(_find_table(images, "chexpert"), _COLUMNS["chexpert"])
    if sections is not None:
        source = _sectioned(Path(sections))
    elif reports is not None:
        source = _free_text(Path(reports))
    else:
        raise ValueError("reports: expected a directory or ZIP of reports, or a sections file")
    manifest = Manifest(data_use=DATA_USE)
    rows = _select(metadata, split, images, manifest)
    rows = _attach_reports(rows, source, manifest)
    manifest.rows = _attach_labels(rows, labels, manifest)
    check_split(manifest.rows)
    return manifest


def read_table(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    """Reads a .csv or .csv.gz with every value as text, blanks as "".

    Raises FileNotFoundError, or ValueError for a missing column or a file that is no CSV.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UnicodeDecodeError:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="latin-1")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable CSV table ({error})") from None
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path}: missing column {', '.join(missing)}; "
            f"found {', '.join(map(str, table.columns))}"
        )
    return table


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


def _select(
    metadata: pd.DataFrame, split: pd.DataFrame, images: Path, manifest: Manifest
) -> pd.DataFrame:
    """Frontal images with a split, one row each."""
    split_of = dict(zip(split["dicom_id"], split["split"], strict=True))
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
    table = labels.drop_duplicates("study_id").set_index("study_id")
    manifest.counts["studies_without_labels"] = int(
        (~rows["study_id"].drop_duplicates().isin(table.index)).sum()
    )
    manifest.counts["duplicate_label_rows"] = len(labels) - len(table)
    for name in CHEXPERT_LABELS:
        values = table[name] if name in table.columns else pd.Series(dtype=str)
        numbers = pd.to_numeric(values, errors="coerce").astype("float32")
        rows[LABEL_PREFIX + name] = rows["study_id"].map(numbers).astype("float32")
    return rows


def _sectioned(path: Path) -> ReportSource:
    table = read_table(path, _COLUMNS["sections"]).drop_duplicates("study", keep="last")
    by_study = table.set_index("study").to_dict("index")

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
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
            return f"unreadable report in the archive ({error})"

    return read
