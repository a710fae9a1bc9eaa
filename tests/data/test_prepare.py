import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from mimic_layout import ramp_jpeg

from mpma_train.cli import main
from mpma_train.data import Store
from mpma_train.data import build as build_module


def run(*arguments) -> int:
    return main(["prepare", *map(str, arguments), "--workers", "1"])


def prepare_mimic(mimic, out, *more) -> int:
    where = ("--images", mimic.root, "--reports", mimic.root, "--out", out, "--side", 32)
    return run("mimic-cxr", *where, *more)


@pytest.fixture
def refused(capsys):
    """Takes the exit status of a command that was to be refused; returns its one line."""

    def line(status: int) -> str:
        assert status == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("mpma: error: ")

    return line


def test_store_holds_what_the_folder_held(small_mimic, tmp_path):
    small_mimic.write_tables(zipped=True)
    assert prepare_mimic(small_mimic, tmp_path / "out") == 0
    store = Store(tmp_path / "out")
    assert store.images.shape == (6, 32, 32) and store.images.dtype == np.uint8
    assert store.side == 32 and store.rows("train").tolist() == [0, 1, 2, 3]
    assert store.rows("test").dtype == np.int64
    assert "Pleural Effusion" in store.label_names and len(store.label_names) == 14
    columns = {"image_id", "study_id", "patient_id", "view", "split", "report"}
    assert columns | {f"label/{name}" for name in store.label_names} == set(store.pairs.columns)
    meta = store.meta
    assert meta["source"] == "mimic-cxr" and "forbids sharing" in meta["data_use"]
    assert meta["counts"]["patients"] == 6 and meta["splits"]["validate"]["images"] == 1
    assert meta["labels"]["Pneumonia"] == {"positive": 0, "negative": 0, "uncertain": 6}
    assert meta["section_rules"] == {"impression_findings": 6}
    assert meta["duplicate_report_share"] == 0
    train = np.asarray(store.images[:4]) / 255
    assert meta["image_mean"] == pytest.approx(train.mean())
    assert meta["image_std"] == pytest.approx(train.std())
    assert pd.read_csv(tmp_path / "out" / "skipped.csv").empty
    assert sorted(os.listdir(tmp_path / "out")) == [
        "images.npy",
        "meta.json",
        "pairs.parquet",
        "skipped.csv",
        "tokenizer.json",
    ]


def test_unreadable_images_are_left_out_and_rows_stay_aligned(small_mimic, tmp_path):
    paths = [small_mimic.image_path(f"1000003{n}", f"5041426{n}", f"{n}a2b-c{n}") for n in range(6)]
    for number, path in enumerate(paths):
        ramp_jpeg(path, 32, 20 + 2 * number)
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    paths[2].write_text("not an image")
    paths[3].unlink()
    small_mimic.write_tables()
    out = tmp_path / "out"
    assert prepare_mimic(small_mimic, out, "--max-skipped", 0.5) == 0
    store = Store(out)
    assert store.pairs["image_id"].tolist() == ["1a2b-c1", "4a2b-c4", "5a2b-c5"]
    # The width of what is not padding tells which file a row came from.
    widths = [(image[16] > 0).sum() for image in np.asarray(store.images)]
    assert widths == [pytest.approx(20 + 2 * n, abs=2) for n in (1, 4, 5)]
    assert (out / "images.npy").stat().st_size == store.images.offset + 3 * 32 * 32
    skipped = pd.read_csv(out / "skipped.csv").set_index("image_id")["reason"]
    assert "truncated" in skipped["0a2b-c0"].lower()
    assert "not a JPEG, PNG or DICOM" in skipped["2a2b-c2"]
    assert "missing or unreadable file" in skipped["3a2b-c3"]
    assert store.meta["skipped"]["images"] == 3


def test_too_many_skipped_is_an_error_that_lists_the_reasons(
    small_mimic, tmp_path, capsys, refused
):
    small_mimic.image_path("10000030", "50414260", "0a2b-c0").write_text("no image")
    small_mimic.write_tables()
    message = refused(prepare_mimic(small_mimic, tmp_path / "out"))
    assert re.match(r"1 of 6 pairs \(16.7%\) .*0\.05.*1 x not a JPEG.*skipped\.csv", message)
    assert len(pd.read_csv(tmp_path / "out" / "skipped.csv")) == 1
    with pytest.raises(ValueError, match="incomplete"):
        Store(tmp_path / "out")
    assert prepare_mimic(small_mimic, tmp_path / "out", "--max-skipped", "0.2") == 0
    assert "5 of 6 images are there" in capsys.readouterr().err
    assert len(Store(tmp_path / "out").pairs) == 5


def test_pixel_limit_is_a_setting(small_mimic, tmp_path, refused):
    small_mimic.write_tables()
    message = refused(prepare_mimic(small_mimic, tmp_path / "out", "--max-pixels", 1000))
    assert message.startswith("no pair can be prepared: 6 skipped (6 x 30 x 40 pixels")


def test_nothing_but_lateral_views_says_so(mimic, tmp_path, refused):
    mimic.add_study("10000030", "50414260", "a")
    mimic.metadata = [line.replace(",PA,", ",LATERAL,") for line in mimic.metadata]
    mimic.write_tables()
    message = refused(prepare_mimic(mimic, tmp_path / "out"))
    assert message.endswith("0 skipped (none), other views: 1 LATERAL")


def test_interrupted_preparation_is_refused_and_goes_on(small_mimic, tmp_path, monkeypatch, capsys):
    small_mimic.write_tables()
    out, read, calls = tmp_path / "out", build_module.read_image, []

    def counting(path, side, **limits):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(path, side, **limits)

    monkeypatch.setattr(build_module, "CHUNK", 1)
    monkeypatch.setattr(build_module, "read_image", counting)
    assert prepare_mimic(small_mimic, out) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not (out / "meta.json").exists()
    with pytest.raises(ValueError, match="incomplete: its preparation was interrupted"):
        Store(out)
    assert prepare_mimic(small_mimic, out) == 0
    assert "3 of 6 images are there" in capsys.readouterr().err
    # Three before the interruption, the interrupted one, and the three that were missing.
    assert len(calls) == 7
    resumed = Store(out)
    whole = tmp_path / "whole"
    prepare_mimic(small_mimic, whole)
    assert resumed.meta["hashes"] == Store(whole).meta["hashes"]


def test_interruption_while_rows_are_removed_starts_afresh(small_mimic, tmp_path, monkeypatch):
    small_mimic.image_path("10000030", "50414260", "0a2b-c0").write_text("no image")
    small_mimic.write_tables()
    allow = ("--max-skipped", 0.5)
    monkeypatch.setattr(build_module, "_meta", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_mimic(small_mimic, tmp_path / "out", *allow)
    monkeypatch.undo()
    prepare_mimic(small_mimic, tmp_path / "out", *allow)
    prepare_mimic(small_mimic, tmp_path / "whole", *allow)
    hashes = [Store(tmp_path / name).meta["hashes"] for name in ("out", "whole")]
    assert hashes[0] == hashes[1]


def test_interruption_under_other_settings_starts_afresh(small_mimic, tmp_path, monkeypatch):
    small_mimic.write_tables()
    monkeypatch.setattr(build_module, "_make_tokenizer", lambda *_: 1 / 0)
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        prepare_mimic(small_mimic, out)
    monkeypatch.undo()
    assert prepare_mimic(small_mimic, out, "--side", 48) == 0
    assert Store(out).images.shape == (6, 48, 48)


def test_second_run_does_nothing_until_a_file_changes(small_mimic, tmp_path, capsys):
    small_mimic.write_tables()
    out = tmp_path / "out"
    prepare_mimic(small_mimic, out)
    written = (out / "images.npy").stat().st_mtime_ns
    prepare_mimic(small_mimic, out, "--max-skipped", 0.5)  # changes no image
    assert "nothing to do" in capsys.readouterr().err
    assert (out / "images.npy").stat().st_mtime_ns == written
    ramp_jpeg(small_mimic.image_path("10000030", "50414260", "0a2b-c0"), 20, 40)
    prepare_mimic(small_mimic, out)
    assert (np.asarray(Store(out).images[0])[:8] == 0).all()


def test_second_run_keeps_the_list_of_what_was_skipped(small_mimic, tmp_path):
    small_mimic.write_tables()
    small_mimic.image_path("10000030", "50414260", "0a2b-c0").write_bytes(b"no image")
    for _ in range(2):
        prepare_mimic(small_mimic, tmp_path / "out", "--max-skipped", 0.9)
        skipped = (tmp_path / "out" / "skipped.csv").read_text()
        assert "0a2b-c0" in skipped


def test_path_that_cannot_be_written(small_mimic, tmp_path, refused):
    small_mimic.write_tables()
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        expected = f"cannot write the store to {out}: "
        assert refused(prepare_mimic(small_mimic, out)).startswith(expected)
        assert refused(run("synthetic", "--out", out)).startswith(expected)


def test_disk_that_is_too_small(small_mimic, tmp_path, monkeypatch, refused):
    small_mimic.write_tables()
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 100, raising=False)
    assert refused(prepare_mimic(small_mimic, tmp_path / "out")).startswith("not enough disk in")


def test_disk_that_is_too_small_leaves_the_old_store(small_mimic, tmp_path, monkeypatch, refused):
    small_mimic.write_tables()
    out = tmp_path / "out"
    prepare_mimic(small_mimic, out)
    before = Store(out).images.copy()
    ramp_jpeg(small_mimic.image_path("10000030", "50414260", "0a2b-c0"), 20, 40)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 100, raising=False)
    assert refused(prepare_mimic(small_mimic, out)).startswith("not enough disk in")
    assert np.array_equal(Store(out).images, before)


def test_csv_without_patients_warns_loudly(tmp_path, capsys):
    for number in range(12):
        ramp_jpeg(tmp_path / "in" / f"{number}.jpg")
    lines = [f"{n}.jpg,Report number {n % 6} has words." for n in range(12)]
    table = tmp_path / "in" / "pairs.csv"
    table.write_text("\n".join(["image_path,report_content", *lines]))
    run("csv", "--csv", table, "--out", tmp_path / "out", "--side", 16)
    assert "WARNING: pairs.csv has no column patient_id" in capsys.readouterr().err
    meta = Store(tmp_path / "out").meta
    assert meta["warnings"] and meta["duplicate_report_share"] == 0.5
    assert [meta["splits"][name]["images"] for name in ("train", "validate", "test")] == [10, 1, 1]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("--side", 8, "side must be 16 to 4096 pixels, got 8"),
        ("--max-skipped", 1.5, "max_skipped must be a fraction from 0 to 1, got 1.5"),
        ("--max-pixels", 0, "max_pixels must be positive, got 0"),
        ("--vocab-size", 5, "vocab_size must be at least 100, got 5"),
    ],
)
def test_settings_are_checked(small_mimic, tmp_path, refused, setting, value, message):
    assert refused(prepare_mimic(small_mimic, tmp_path / "out", setting, value)) == message


def test_store_that_is_not_there_is_damaged_or_of_another_format(small_mimic, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared store in .*mpma prepare"):
        Store(tmp_path)
    small_mimic.write_tables()
    out = tmp_path / "out"
    prepare_mimic(small_mimic, out)
    with pytest.raises(ValueError, match="split must be one of train, validate, test, got 'valid'"):
        Store(out).rows("valid")
    np.save(out / "images.npy", np.zeros((5, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"damaged: images.npy has shape \(5, 32, 32\)"):
        Store(out)
    (out / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99, expected 1"):
        Store(out)


def test_missing_csv_is_named(tmp_path, refused):
    message = refused(run("csv", "--csv", tmp_path / "no.csv", "--out", tmp_path / "out"))
    assert message == f"{tmp_path / 'no.csv'}: no such file"
