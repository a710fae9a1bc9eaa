"""Bad input through the whole command, from files written by hand to the store and the messages.

What becomes of one file, table or report alone is tested beside its reader.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from mimic_layout import RAMP, REPORT, write_dicom
from PIL import Image

import mpma_train
from mpma_train.cli import main
from mpma_train.data import Store

ADDENDUM = """ ADDENDUM  The report was revised after review with Dr. ___.

 IMPRESSION:  Right mass.

"""
TWO_FINDINGS = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 FINDINGS:  Preliminary reading.

 FINDINGS:  The lungs are clear.

 IMPRESSION:  No acute process.
"""


def prepare(mimic, out, *more) -> int:
    mimic.write_tables()
    where = ["--images", mimic.root, "--reports", mimic.root, "--out", out, "--side", 32]
    return main(["prepare", "mimic-cxr", *map(str, [*where, *more])])


def reasons(out) -> dict[str, str]:
    return pd.read_csv(out / "skipped.csv").set_index("image_id")["reason"].to_dict()


def test_reports_of_every_shape(small_mimic, tmp_path, capsys):
    contents = {
        0: ADDENDUM + REPORT.format(number="of the report"),
        1: TWO_FINDINGS,
        2: REPORT.format(number="small").lower(),
        3: " FINDINGS:  Sj\xf6gren.\n".encode("latin-1"),
        4: "",
        5: " \n\t\r\n ",
    }
    for number, content in contents.items():
        small_mimic.add_report(f"1000003{number}", f"5041426{number}", content)
    assert prepare(small_mimic, tmp_path / "out", "--max-skipped", 0.5) == 0
    store = Store(tmp_path / "out")
    assert store.pairs["report"].tolist() == [
        "Left effusion of the report. Small left pleural effusion of the report. No pneumothorax.",
        "No acute process. The lungs are clear.",
        "left effusion small. small left pleural effusion small. no pneumothorax.",
        "Sjögren.",
    ]
    assert store.meta["section_rules"] == {
        "addendum_dropped": 1,
        "header_without_colon": 1,
        "repeated_section": 1,
        "impression_findings": 3,
        "findings": 1,
        "not_utf8": 1,
        "empty": 2,
    }
    assert reasons(tmp_path / "out") == {"4a2b-c4": "empty report", "5a2b-c5": "empty report"}
    assert "WARNING: 1 reports are not UTF-8: they were read as Latin-1" in capsys.readouterr().err


def test_tables_that_repeat_and_lack_rows(small_mimic, tmp_path, capsys):
    small_mimic.add_image("second", "10000030", "50414260", view="", meaning="antero-posterior")
    small_mimic.add_image("nowhere", "10000030", "50414260", view="", meaning="")
    small_mimic.metadata.append(small_mimic.metadata[1])
    small_mimic.labels.append(small_mimic.labels[1].replace("1.0", "0.0", 1))
    del small_mimic.labels[2]
    assert prepare(small_mimic, tmp_path / "out", "--max-skipped", 0.2) == 0
    store = Store(tmp_path / "out")
    assert store.meta["counts"]["images"] == 7 and store.meta["counts"]["studies"] == 6
    pairs = store.pairs.set_index("image_id")
    assert pairs.loc["second", "view"] == "AP"
    assert pairs.loc["second", "report"] == pairs.loc["0a2b-c0", "report"]
    assert pairs.loc["1a2b-c1", "label/Pleural Effusion"] == 1
    assert pairs.loc["2a2b-c2"].filter(like="label/").isna().all()
    assert store.meta["filtered_views"] == {"no view": 1}
    assert reasons(tmp_path / "out") == {"1a2b-c1": "duplicate row of the metadata table"}
    said = capsys.readouterr().err
    assert "WARNING: 1 studies have no row in the chexpert table: their labels are blank" in said
    assert "WARNING: mimic-cxr-2.0.0-chexpert.csv has 1 rows of studies that it holds alr" in said


def test_label_that_is_no_label_is_one_line(small_mimic, tmp_path, capsys):
    small_mimic.add_label("10000039", "50414269", Edema="yes")
    assert prepare(small_mimic, tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines() == [
        "mpma: error: mimic-cxr-2.0.0-chexpert.csv: column 'Edema', study_id 50414269: a label "
        "must be 1 (positive), 0 (negative), -1 (uncertain) or blank (not mentioned), got 'yes'"
    ]


def test_sixteen_bits_and_both_monochrome_forms_are_one_picture(mimic, tmp_path):
    study = mimic.study_folder("10000030", "50414260")
    study.mkdir(parents=True)
    Image.fromarray(RAMP).save(study / "a.png")
    write_dicom(study / "b.dcm", RAMP, "MONOCHROME2")
    write_dicom(study / "c.dcm", 4095 - RAMP, "MONOCHROME1")
    write_dicom(study / "d.dcm", RAMP, "PALETTE COLOR")
    table = mimic.root / "pairs.csv"
    lines = [
        f"{study.relative_to(mimic.root)}/{name},Clear lungs.,10000030,train"
        for name in ("a.png", "b.dcm", "c.dcm", "d.dcm")
    ]
    table.write_text("\n".join(["image_path,report_content,patient_id,split", *lines]))
    arguments = ["--csv", table, "--out", tmp_path / "out", "--side", 32, "--max-skipped", 0.25]
    assert main(["prepare", "csv", *map(str, arguments)]) == 0
    expected = np.rint(RAMP / 4095 * 255)
    first, second, inverted = np.asarray(Store(tmp_path / "out").images).astype(int)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    # The inversion may round a half the other way.
    assert np.abs(inverted - expected).max() <= 1
    (reason,) = reasons(tmp_path / "out").values()
    assert reason == "DICOM of form PALETTE COLOR, expected MONOCHROME1 or MONOCHROME2"


def test_store_made_for_another_image_size(small_mimic, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(small_mimic, out) == 0
    capsys.readouterr()
    preset = Path(mpma_train.__file__).parent / "configs/tiny.yaml"
    run = [str(preset), "--data", str(out), "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", *run]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "mpma: error: data: expected images of side 128 (image_size 64 × target_scale 2), "
        f"{out} was made for 32; prepare it again with --side 128"
    )
