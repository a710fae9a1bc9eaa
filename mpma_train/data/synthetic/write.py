"""Writes the made-up set to disk in the raw layout of MIMIC-CXR-JPG.

    files/p10/p10000032/s50000001/<dicom_id>.jpg          images
    files/p10/p10000032/s50000001.txt                     free-text reports
    mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz      tables, gzipped as they are published
    masks/<dicom_id>_<finding>.png, masks.csv             where each finding was drawn
    questions.json                                        question-answer pairs
    synthetic.json                                        what was asked for; completed last

The same seed and library versions give the same bytes, on any number of worker processes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ..names import CHEXPERT_LABELS
from . import images
from .questions import ask
from .reports import write_report
from .scene import Scene, sample_build, sample_scene

GENERATOR_VERSION = 5
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


def write_raw(
    out: Path,
    *,
    pairs: int,
    seed: int,
    workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `pairs` image-report pairs under `out`. `progress` is told how many images are done.

    A complete set of the same size, seed and generator is left as it is.
    """
    asked = {"pairs": pairs, "seed": seed, "generator": GENERATOR_VERSION, "complete": True}
    note = out / "synthetic.json"
    if note.exists():
        if json.loads(note.read_text()) == asked:
            return
        for folder in ("files", "masks"):
            shutil.rmtree(out / folder, ignore_errors=True)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something other than a synthetic set: choose another --out")
    (out / "masks").mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asked | {"complete": False}))
    studies = plan_studies(pairs, seed)
    tables: dict[str, list] = {}
    write = partial(_write_study, out=out, seed=seed)

    def gather(results) -> None:
        done = 0
        for study, rows in zip(studies, results, strict=True):
            for name, entries in rows.items():
                tables.setdefault(name, []).extend(entries)
            done += study["images"]
            progress(done)

    if workers > 1:
        # spawn: the caller may have started threads, which a forked child would inherit broken.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            gather(pool.map(write, studies, chunksize=16))
    else:
        gather(map(write, studies))
    for name in ("metadata", "split", "chexpert"):
        _write_table(tables[name], out / f"mimic-cxr-2.0.0-{name}.csv.gz")
    _write_table(tables["masks"], out / "masks.csv")
    questions = [{"qid": number, **row} for number, row in enumerate(tables["questions"])]
    (out / "questions.json").write_text(json.dumps(questions, indent=0))
    note.write_text(json.dumps(asked))
