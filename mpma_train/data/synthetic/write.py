"""Writes the made-up set to disk in the raw layout of MIMIC-CXR-JPG.

    files/p10/p10000032/s50000001/<dicom_id>.jpg          images
    files/p10/p10000032/s50000001.txt                     free-text reports
    mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz      tables, gzipped as they are published
    masks/<dicom_id>_<finding>.png, masks.csv             where each finding was drawn
    questions.json                                        question-answer pairs
    synthetic.json                                        what was asked for; completed last
    unfinished.jsonl                                      while drawing: rows of finished studies

The same seed and library versions give the same bytes, on any number of worker processes and over
any number of interruptions.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ..names import CHEXPERT_LABELS
from ..store import write_atomically
from . import images
from .questions import ask
from .reports import write_report
from .scene import Scene, sample_build, sample_scene

GENERATOR_VERSION = 5
NOTE = "synthetic.json"
RECORD = "unfinished.jsonl"
SPLIT_SHARES = {"train": 0.8, "validate": 0.1, "test": 0.1}
VIEW_MEANINGS = {"PA": "postero-anterior", "AP": "antero-posterior"}

_INDICATIONS = ("cough", "fever", "chest pain", "shortness of breath", "line placement", "fall")


def plan_studies(pairs: int, seed: int) -> list[dict]:
    """Deals `pairs` images to studies and patients, and patients to splits.

    Two in three patients have one study; three in a hundred studies have two images.
    """
    rng = np.random.default_rng([seed, 0])
    studies, patient, images_left = [], 0, pairs
    while images_left > 0:
        for _ in range(int(rng.choice((1, 2, 3), p=(0.68, 0.22, 0.1)))):
            count = min(images_left, 2 if rng.random() < 0.03 else 1)
            if count > 0:
                number = len(studies)
                studies.append({"number": number, "patient": patient, "images": count})
            images_left -= count
        patient += 1
    order = rng.permutation(patient)
    per_patient = np.bincount([s["patient"] for s in studies], [s["images"] for s in studies])
    reached = np.empty(patient)
    reached[order] = np.cumsum(per_patient[order]) / pairs
    bounds = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
    for study in studies:
        split = int(np.searchsorted(bounds, reached[study["patient"]] - 1e-9))
        study["split"] = list(SPLIT_SHARES)[split]
    return studies


def _free_text(scene: Scene, sections: dict[str, list[str]], rng: np.random.Generator) -> str:
    """The report as a file: headers, wrapped paragraphs, now and then what must be dropped."""

    def paragraph(words: str) -> str:
        return textwrap.fill(words, 76, initial_indent=" ", subsequent_indent=" ")

    lower = rng.random() < 0.06
    reason = _INDICATIONS[int(rng.integers(len(_INDICATIONS)))]
    technique = "Portable AP view of the chest." if scene.view == "AP" else "PA view of the chest."
    blocks = [" " * 33 + "FINAL REPORT"]
    if rng.random() < 0.04:
        addendum = (
            "The report was reviewed with the referring service. No change to the impression."
        )
        blocks.insert(0, paragraph(f"ADDENDUM  {addendum}"))
    blocks.append(
        paragraph(f"EXAMINATION:  CHEST ({'PORTABLE AP' if scene.view == 'AP' else 'PA'})")
    )
    blocks.append(
        paragraph(f"INDICATION:  ___ year old {scene.build.sex} with {reason}.  // evaluate")
    )
    blocks.append(paragraph(f"TECHNIQUE:  {technique}"))
    blocks.append(paragraph("COMPARISON:  ___." if rng.random() < 0.5 else "COMPARISON:  None."))
    for name in ("findings", "impression"):
        if name in sections:
            header = name.capitalize() if lower else name.upper()
            blocks.append(f" {header}:")
            blocks.append(paragraph(" ".join(sections[name])))
    if rng.random() < 0.05:
        told = "The findings were discussed with Dr. ___ by telephone on ___ at 4:10 pm."
        blocks.append(paragraph(f"NOTIFICATION:  {told}"))
    return "\n\n".join(blocks) + "\n"


def _slug(label: str) -> str:
    return label.lower().replace(" ", "-")


def _write_study(study: dict, *, out: Path, seed: int) -> dict:
    """Draws, words and writes one study; returns its rows of the tables."""
    build = sample_build(np.random.default_rng([seed, 1, study["patient"]]))
    rng = np.random.default_rng([seed, 2, study["number"]])
    scene = sample_scene(rng, build)
    sections, labels = write_report(scene, rng)
    subject, number = 10_000_000 + study["patient"], 50_000_000 + study["number"]
    folder = out / "files" / f"p{str(subject)[:2]}" / f"p{subject}"
    (folder / f"s{number}").mkdir(parents=True, exist_ok=True)
    (folder / f"s{number}.txt").write_text(_free_text(scene, sections, rng), encoding="utf-8")
    rows: dict = {"metadata": [], "split": [], "masks": [], "questions": []}
    for index in range(study["images"]):
        digest = hashlib.sha256(f"{seed}/{number}/{index}".encode()).hexdigest()
        dicom_id = "-".join(digest[i : i + 8] for i in range(0, 40, 8))
        grey, masks = images.draw(scene, rng)
        Image.fromarray(grey).save(folder / f"s{number}" / f"{dicom_id}.jpg", quality=92)
        rows["metadata"].append(
            {
                "dicom_id": dicom_id,
                "subject_id": subject,
                "study_id": number,
                "PerformedProcedureStepDescription": "CHEST",
                "ViewPosition": scene.view,
                "Rows": grey.shape[0],
                "Columns": grey.shape[1],
                "ViewCodeSequence_CodeMeaning": VIEW_MEANINGS[scene.view],
            }
        )
        keys = {"dicom_id": dicom_id, "study_id": number, "subject_id": subject}
        rows["split"].append({**keys, "split": study["split"]})
        for finding, mask in zip(scene.findings, masks, strict=True):
            name = f"{dicom_id}_{_slug(finding.label)}.png"
            Image.fromarray(mask).save(out / "masks" / name)
            place = {"side": finding.side, "zone": finding.zone, "size": finding.size}
            row = {"dicom_id": dicom_id, "label": finding.label, **place, "device": finding.device}
            rows["masks"].append({**row, "path": f"masks/{name}"})
        for entry in ask(scene, rng):
            rows["questions"].append({"image_name": dicom_id, "split": study["split"], **entry})
    rows["chexpert"] = [
        {
            "subject_id": subject,
            "study_id": number,
            **{name: labels.get(name) for name in CHEXPERT_LABELS},
        }
    ]
    return rows


def _write_table(rows: list[dict], path: Path) -> None:
    text = pd.DataFrame(rows).to_csv(index=False).encode()
    # mtime=0 and no file name in the header: the same rows give the same bytes.
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _open(out: Path, asked: dict) -> bool:
    """Readies `out` for the asked set, keeping what was begun of it; False if it is complete."""
    note = out / NOTE
    begun = json.loads(note.read_text()) if note.exists() else None
    if begun == asked | {"complete": True}:
        return False
    if begun == asked | {"complete": False}:
        return True
    # All that an interruption of the first note leaves is its temporary file.
    if begun is None and out.exists() and {path.name for path in out.iterdir()} - {f"{NOTE}.tmp"}:
        raise ValueError(f"{out} holds something other than a synthetic set: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    # This note fits no set: after an interruption before the next one, everything is removed again.
    write_atomically(note, b"{}")
    for folder in (out / "files", out / "masks"):
        if folder.exists():
            shutil.rmtree(folder)
    (out / RECORD).unlink(missing_ok=True)
    (out / "masks").mkdir()
    write_atomically(note, json.dumps(asked | {"complete": False}).encode())
    return True


def _recorded(record: Path) -> list[dict]:
    """The rows of the studies finished before an interruption; a line cut short is removed."""
    lines = record.read_bytes().splitlines(keepends=True) if record.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    record.write_bytes(b"".join(whole))
    return [json.loads(line) for line in whole]


def _write_studies(studies: list[dict], out: Path, seed: int, workers: int) -> Iterator[dict]:
    """The rows of every study, in order; only what is not on record is drawn."""
    finished = _recorded(out / RECORD)
    yield from finished
    todo = studies[len(finished) :]
    write = partial(_write_study, out=out, seed=seed)
    with (out / RECORD).open("a", buffering=1) as record:
        for rows in _in_order(write, todo, workers):
            record.write(json.dumps(rows) + "\n")
            yield rows


def _in_order(write: Callable[[dict], dict], studies: list[dict], workers: int) -> Iterator[dict]:
    if workers == 1:
        yield from map(write, studies)
        return
    # spawn: the caller may have started threads, which a forked child would inherit broken.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(write, studies, chunksize=16)


def write_raw(
    out: Path,
    *,
    pairs: int,
    seed: int,
    workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `pairs` image-report pairs under `out`. `progress` is told how many images are done.

    A complete set of the same size, seed and generator is left as it is; one that was interrupted
    goes on after the last study that was finished.
    """
    asked = {"pairs": pairs, "seed": seed, "generator": GENERATOR_VERSION}
    if not _open(out, asked):
        return
    studies = plan_studies(pairs, seed)
    tables: dict[str, list] = {}
    done = 0
    for study, rows in zip(studies, _write_studies(studies, out, seed, workers), strict=True):
        for name, entries in rows.items():
            tables.setdefault(name, []).extend(entries)
        done += study["images"]
        progress(done)
    for name in ("metadata", "split", "chexpert"):
        _write_table(tables[name], out / f"mimic-cxr-2.0.0-{name}.csv.gz")
    _write_table(tables["masks"], out / "masks.csv")
    questions = [{"qid": number, **row} for number, row in enumerate(tables["questions"])]
    (out / "questions.json").write_text(json.dumps(questions, indent=0))
    (out / RECORD).unlink()
    write_atomically(out / NOTE, json.dumps(asked | {"complete": True}).encode())
