import gzip
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mpma_train.cli import main
from mpma_train.data import Store
from mpma_train.data.names import CHEXPERT_LABELS
from mpma_train.data.synthetic import write as write_module
from mpma_train.data.synthetic.write import write_raw


def folder_hash(folder) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    out = tmp_path_factory.mktemp("raw")
    write_raw(out, pairs=40, seed=5)
    return out


def prepare(out, *more: str) -> int:
    size = ("--pairs", "40", "--side", "64", "--workers", "1")
    return main(["prepare", "synthetic", "--out", str(out), *size, *more])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("store")
    assert prepare(out) == 0
    return Store(out)


def test_the_set_goes_through_the_reader(store):
    assert len(store.pairs) == 40 and store.meta["source"] == "synthetic"
    assert set(store.pairs["view"]) == {"PA", "AP"} and store.meta["skipped"]["images"] == 0
    assert store.label_names == CHEXPERT_LABELS and store.meta["data_use"] == ""


def test_same_seed_same_bytes_other_seed_other_bytes(raw, tmp_path):
    write_raw(tmp_path / "again", pairs=40, seed=5)
    write_raw(tmp_path / "other", pairs=40, seed=6)
    assert folder_hash(tmp_path / "again") == folder_hash(raw)
    assert folder_hash(tmp_path / "other") != folder_hash(raw)


def test_workers_change_no_byte(raw, tmp_path):
    write_raw(tmp_path / "parallel", pairs=40, seed=5, workers=2)
    assert folder_hash(tmp_path / "parallel") == folder_hash(raw)


def test_layout_is_the_published_one(raw):
    metadata = pd.read_csv(raw / "mimic-cxr-2.0.0-metadata.csv.gz", dtype=str)
    split = pd.read_csv(raw / "mimic-cxr-2.0.0-split.csv.gz", dtype=str)
    chexpert = pd.read_csv(raw / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert list(split.columns) == ["dicom_id", "study_id", "subject_id", "split"]
    assert list(chexpert.columns) == ["subject_id", "study_id", *CHEXPERT_LABELS]
    values = chexpert[list(CHEXPERT_LABELS)].to_numpy()
    assert set(values[~np.isnan(values)]) <= {-1.0, 0.0, 1.0}
    for row in metadata.itertuples():
        study = raw / "files" / f"p{row.subject_id[:2]}" / f"p{row.subject_id}" / f"s{row.study_id}"
        with Image.open(study / f"{row.dicom_id}.jpg") as image:
            assert image.format == "JPEG" and image.mode == "L"
            assert image.size == (int(row.Columns), int(row.Rows))
        assert "FINAL REPORT" in study.with_suffix(".txt").read_text()


def test_masks_and_questions_belong_to_images(raw):
    metadata = pd.read_csv(raw / "mimic-cxr-2.0.0-metadata.csv.gz").set_index("dicom_id")
    masks = pd.read_csv(raw / "masks.csv", keep_default_na=False)
    assert set(masks["dicom_id"]) <= set(metadata.index) and len(masks) > 20
    for row in masks.itertuples():
        mask = np.asarray(Image.open(raw / row.path))
        size = metadata.loc[row.dicom_id, ["Rows", "Columns"]]
        assert mask.dtype == bool and list(mask.shape) == list(size) and mask.any()
    questions = json.loads((raw / "questions.json").read_text())
    assert {entry["image_name"] for entry in questions} == set(metadata.index)
    assert {entry["answer_type"] for entry in questions} == {"OPEN", "CLOSED"}
    assert [entry["qid"] for entry in questions] == list(range(len(questions)))


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a synthetic set"):
        write_raw(tmp_path, pairs=3, seed=0)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_another_size_replaces_the_old_files(tmp_path):
    write_raw(tmp_path, pairs=6, seed=0)
    write_raw(tmp_path, pairs=3, seed=0)
    assert len(list(tmp_path.rglob("*.jpg"))) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_drawing_goes_on_to_the_same_bytes(raw, tmp_path, workers):
    def interrupt(done):
        if done >= 10:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_raw(out, pairs=40, seed=5, workers=workers, progress=interrupt)
    with gzip.open(raw / "mimic-cxr-2.0.0-metadata.csv.gz", "rt") as table:
        order = [line.split(",")[0] for line in table][1:]
    drawn = {path.stem: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    # What a kill may leave besides, the first 10 or 11 images being on record: a record and an
    # image that are not whole.
    with (out / write_module.RECORD).open("a") as record:
        record.write('{"metadata": [{"dicom_id"')
    (image,) = raw.rglob(f"{order[11]}.jpg")
    half = out / image.relative_to(raw)
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(image.read_bytes()[:1000])
    write_raw(out, pairs=40, seed=5, workers=workers)
    assert folder_hash(out) == folder_hash(raw)
    again = {path.stem: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert all(again[name] == drawn[name] for name in order[:10])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_interruption_at_any_note_can_be_run_again(raw, tmp_path, monkeypatch, number):
    write, calls = write_module.write_atomically, []

    def interrupted(path, content):
        calls.append(path)
        if len(calls) == number + 1:
            path.with_name(path.name + ".tmp").write_bytes(content[:1])
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(write_module, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_raw(tmp_path / "out", pairs=40, seed=5)
    monkeypatch.undo()
    write_raw(tmp_path / "out", pairs=40, seed=5)
    assert folder_hash(tmp_path / "out") == folder_hash(raw)


def test_a_set_whose_replacement_was_interrupted_is_not_taken_for_complete(tmp_path, monkeypatch):
    write_raw(tmp_path / "whole", pairs=6, seed=0)
    write_raw(tmp_path / "out", pairs=6, seed=0)
    remove = write_module.shutil.rmtree

    def interrupted(folder):
        remove(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_raw(tmp_path / "out", pairs=3, seed=0)
    monkeypatch.undo()
    write_raw(tmp_path / "out", pairs=6, seed=0)
    assert folder_hash(tmp_path / "out") == folder_hash(tmp_path / "whole")


def test_interrupted_command_goes_on_to_the_same_store(store, tmp_path, monkeypatch, capsys):
    draw_study, calls = write_module._write_study, []

    def counting(study, **settings):
        calls.append(study["number"])
        if len(calls) == 10:
            raise KeyboardInterrupt
        return draw_study(study, **settings)

    monkeypatch.setattr(write_module, "_write_study", counting)
    assert prepare(tmp_path) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert prepare(tmp_path) == 0
    # Nine before the interruption, the interrupted one, and those that were missing.
    assert calls == [*range(10), *range(9, store.meta["counts"]["studies"])]
    assert Store(tmp_path).meta["hashes"] == store.meta["hashes"]
