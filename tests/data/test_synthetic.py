import argparse
import hashlib
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mpma_train.data import Store, prepare
from mpma_train.data.names import CHEXPERT_LABELS
from mpma_train.data.synthetic.images import draw
from mpma_train.data.synthetic.reports import ZONE_WORDS, write_report
from mpma_train.data.synthetic.scene import (
    COMBINATION_SHARES,
    NO_FINDING,
    SINGLE_SHARES,
    Finding,
    Scene,
    sample_build,
    sample_scene,
)
from mpma_train.data.synthetic.write import plan_studies, write_raw


def scenes(count: int) -> list[Scene]:
    made = []
    for number in range(count):
        rng = np.random.default_rng([1, number])
        made.append(sample_scene(rng, sample_build(rng)))
    return made


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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("store")
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    line = ["synthetic", "--out", str(out), "--pairs", "40", "--side", "64", "--workers", "1"]
    assert prepare.run(parser.parse_args(line)) == 0
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


def test_plan_deals_patients_to_one_split_each_with_the_asked_shares():
    studies = plan_studies(2400, 0)
    images, splits = Counter(), {}
    for study in studies:
        images[study["split"]] += study["images"]
        assert splits.setdefault(study["patient"], study["split"]) == study["split"]
    assert sum(images.values()) == 2400 and images["test"] >= 200
    assert images["train"] == pytest.approx(1920, abs=10)
    per_patient = Counter(study["patient"] for study in studies)
    assert max(per_patient.values()) > 1 and max(study["images"] for study in studies) == 2


def test_names_alone_do_not_find_the_pair():
    # Expected R@5 of a ranking that knows the finding names only, ties in random order, among the
    # 240 or so test pairs: of n pairs with the same names, 5 of n (or all) are found.
    counts = Counter(frozenset(scene.labels) for scene in scenes(240))
    found = sum(min(5, count) for count in counts.values()) / 240
    assert found < 0.25
    assert set(counts) <= {
        *(frozenset([name]) for name in SINGLE_SHARES),
        *(frozenset(names) for names in COMBINATION_SHARES),
    }


def test_reports_state_what_the_scene_holds_and_labels_follow():
    for number, scene in enumerate(scenes(300)):
        sections, labels = write_report(scene, np.random.default_rng(number))
        text = " ".join(" ".join(part) for part in sections.values()).lower()
        for finding in scene.findings:
            assert labels[finding.label] == 1.0
            assert finding.side in text
            zones = ZONE_WORDS.get(finding.zone, (finding.zone,))
            assert any(word in text for word in zones)
        opposite = {"left": "right", "right": "left"}
        sides = {finding.side for finding in scene.findings} & set(opposite)
        if len(sides) == 1 and len(scene.findings) == 1 and scene.findings[0].zone in ZONE_WORDS:
            (side,) = sides
            zone = ZONE_WORDS[scene.findings[0].zone]
            assert not any(f"{opposite[side]} {word}" in text for word in zone)
        assert labels.get(NO_FINDING) == (None if scene.findings else 1.0)
        assert set(labels) <= set(CHEXPERT_LABELS)
        assert all(labels[name] == 1.0 for name in scene.labels)


def test_reports_vary_in_words_and_have_a_report_s_length():
    texts = []
    for number, scene in enumerate(scenes(300)):
        sections, _ = write_report(scene, np.random.default_rng(number))
        texts.append(" ".join(" ".join(part) for part in sections.values()))
    lengths = [len(text.split()) for text in texts]
    assert len(set(texts)) == 300
    assert 20 <= np.percentile(lengths, 10) and np.percentile(lengths, 90) <= 65


def pair_of_images(**change):
    """The same picture with and without one finding: same random numbers, other scene."""
    base = dict(view="PA", heart_ratio=0.42, inspiration="normal", rotation="")
    build = sample_build(np.random.default_rng(2))
    without = Scene((), build, elevated_diaphragm="", **base)
    with_one = Scene((Finding(**change),), build, elevated_diaphragm="", **base)
    plain, _ = draw(without, np.random.default_rng(9))
    shown, masks = draw(with_one, np.random.default_rng(9))
    return plain, shown, masks[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("label", ["Lung Lesion", "Lung Opacity", "Atelectasis"])
def test_finding_is_drawn_on_the_patient_s_side(label, side):
    _, shown, mask = pair_of_images(label=label, side=side, zone="mid", size="large")
    columns = np.flatnonzero(mask.any(axis=0)) / shown.shape[1]
    # The patient faces the reader: the patient's left is at the right of the image.
    assert (columns.mean() > 0.5) == (side == "left")


def test_zones_lie_above_each_other_and_sizes_grow():
    def mask(zone, size):
        return pair_of_images(label="Lung Lesion", side="right", zone=zone, size=size)[2]

    heights = [np.flatnonzero(mask(zone, "small").any(axis=1)).mean() for zone in ZONE_WORDS]
    assert heights == sorted(heights) and heights[2] - heights[0] > 30
    areas = [mask("mid", size).sum() for size in ("small", "moderate", "large")]
    assert areas[1] > 1.5 * areas[0] and areas[2] > 1.5 * areas[1]


def test_smallest_finding_shows_at_64_pixels():
    _, _, mask = pair_of_images(label="Lung Lesion", side="left", zone="upper", size="small")
    small = Image.fromarray(mask.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX)
    assert np.asarray(small).max() > 200
