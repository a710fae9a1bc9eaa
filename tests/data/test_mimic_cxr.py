import zipfile

import numpy as np
import pytest
from mimic_layout import REPORT

from mpma_train.data.mimic_cxr import read_mimic_cxr


def read(mimic, **settings):
    return read_mimic_cxr(mimic.root, mimic.root, **settings)


@pytest.mark.parametrize("zipped", [False, True])
def test_joins_tables_and_reports(small_mimic, zipped):
    small_mimic.write_tables(zipped=zipped)
    manifest = read(small_mimic)
    row = manifest.rows.set_index("image_id").loc["4a2b-c4"]
    assert row["study_id"] == "50414264" and row["patient_id"] == "10000034"
    assert row["view"] == "PA" and row["split"] == "validate"
    assert (
        row["report"]
        == "Left effusion 50414264. Small left pleural effusion 50414264. No pneumothorax."
    )
    assert row["path"].endswith("files/p10/p10000034/s50414264/4a2b-c4.jpg")
    assert row["label/Pleural Effusion"] == 1 and row["label/Pneumothorax"] == 0
    assert row["label/Pneumonia"] == -1 and row.isna()["label/Edema"]
    assert manifest.rows["label/Edema"].dtype == "float32"
    assert manifest.rows["split"].value_counts().to_dict() == {"train": 4, "validate": 1, "test": 1}
    assert not manifest.skipped and manifest.rules["impression_findings"] == 6


def test_lateral_views_are_left_out_without_counting_as_skipped(small_mimic):
    small_mimic.add_image("lat", "10000030", "50414260", view="LATERAL", meaning="lateral")
    small_mimic.add_image(
        "axi", "10000030", "50414260", view="AP AXIAL", meaning="antero-posterior"
    )
    small_mimic.write_tables()
    manifest = read(small_mimic)
    assert len(manifest.rows) == 6 and not manifest.skipped
    assert manifest.filtered == {"LATERAL": 1, "AP AXIAL": 1}


def test_blank_view_takes_the_code_meaning(small_mimic):
    small_mimic.add_image("x1", "10000030", "50414260", view="", meaning="antero-posterior")
    small_mimic.add_image("x2", "10000030", "50414260", view="", meaning="lateral")
    small_mimic.add_image("x3", "10000030", "50414260", view="", meaning="")
    small_mimic.write_tables()
    manifest = read(small_mimic)
    views = manifest.rows.set_index("image_id")["view"]
    assert views["x1"] == "AP" and "x2" not in views and "x3" not in views
    assert manifest.filtered == {"lateral": 1, "no view": 1}
    assert manifest.counts["views_from_code_meaning"] == 1


def test_study_with_several_images_gives_each_the_report(small_mimic):
    small_mimic.add_image("second", "10000030", "50414260", view="AP")
    small_mimic.write_tables()
    rows = read(small_mimic).rows
    same = rows[rows["study_id"] == "50414260"]
    assert sorted(same["view"]) == ["AP", "PA"] and same["report"].nunique() == 1


def test_duplicate_metadata_row_is_skipped_and_listed(small_mimic):
    small_mimic.metadata.append(small_mimic.metadata[0])
    small_mimic.labels.append(small_mimic.labels[0])
    small_mimic.write_tables()
    manifest = read(small_mimic)
    assert len(manifest.rows) == 6
    assert [entry[2] for entry in manifest.skipped] == ["duplicate row of the metadata table"]
    assert manifest.counts["duplicate_label_rows"] == 1
    assert manifest.warnings == [
        "mimic-cxr-2.0.0-chexpert.csv has 1 rows of studies that it holds already: "
        "the first row of a study counts"
    ]


def test_image_in_two_splits_is_an_error_but_the_same_row_twice_is_not(small_mimic):
    small_mimic.split.append(small_mimic.split[0])
    small_mimic.write_tables()
    assert len(read(small_mimic).rows) == 6
    small_mimic.split.append(small_mimic.split[0].replace("train", "test"))
    small_mimic.write_tables()
    with pytest.raises(ValueError, match=r"split\.csv: 1 images are in more .*first is 0a2b-c0"):
        read(small_mimic)


def test_missing_label_row_leaves_labels_blank_and_is_counted(small_mimic):
    del small_mimic.labels[2]
    small_mimic.write_tables()
    manifest = read(small_mimic)
    row = manifest.rows.set_index("study_id").loc["50414262"]
    assert row.filter(like="label/").isna().all()
    assert manifest.counts["studies_without_labels"] == 1
    assert manifest.warnings == [
        "1 studies have no row in the chexpert table: their labels are blank"
    ]


@pytest.mark.parametrize("cell", ["yes", "2", "2.0", "-1.5", "True", "nan", "1.0.0"])
def test_label_cell_that_is_no_label_names_file_column_study_and_value(small_mimic, cell):
    small_mimic.add_label("10000039", "50414269", Lung_Lesion=cell)
    small_mimic.write_tables()
    found = rf"chexpert\.csv: column 'Lung Lesion', study_id 50414269: .*1 .*0 .*-1 .*got '{cell}'"
    with pytest.raises(ValueError, match=found):
        read(small_mimic)


def test_published_forms_of_a_label_are_read(small_mimic):
    small_mimic.labels = []
    for number, cell in enumerate(["1.0", "0.0", "-1.0", "", " ", "1"]):
        small_mimic.add_label(f"1000003{number}", f"5041426{number}", Edema=cell)
    small_mimic.write_tables()
    labels = read(small_mimic).rows["label/Edema"]
    np.testing.assert_array_equal(labels, [1, 0, -1, np.nan, np.nan, 1])


def test_absent_label_columns_are_named_and_blank(small_mimic):
    small_mimic.write_tables()
    path = small_mimic.root / "mimic-cxr-2.0.0-chexpert.csv"
    renamed = path.read_text().replace("Edema", "edema").replace("Fracture", "Broken")
    path.write_text(renamed)
    manifest = read(small_mimic)
    assert manifest.rows["label/Edema"].isna().all()
    assert (manifest.rows["label/Pleural Effusion"] == 1).all()
    assert manifest.warnings == [
        "mimic-cxr-2.0.0-chexpert.csv has no column Edema, Fracture: "
        "these labels are blank in every study"
    ]


def test_missing_and_foreign_split_rows(small_mimic):
    small_mimic.split[0] = small_mimic.split[0].replace("train", "holdout")
    del small_mimic.split[1]
    small_mimic.write_tables()
    reasons = [reason for _, _, reason in read(small_mimic).skipped]
    assert reasons == [
        "split 'holdout', expected train, validate, test",
        "no row in the split table",
    ]


@pytest.mark.parametrize("content", ["", "  \n \t\n", "FINAL REPORT\n\n IMPRESSION: ___\n"])
def test_empty_report_is_skipped(small_mimic, content):
    small_mimic.add_report("10000031", "50414261", content)
    small_mimic.write_tables()
    manifest = read(small_mimic)
    assert manifest.skipped[0][0] == "1a2b-c1" and manifest.skipped[0][2] == "empty report"
    assert manifest.rules["empty"] == 1 and "1a2b-c1" not in set(manifest.rows["image_id"])


def test_missing_and_oversized_report(small_mimic):
    small_mimic.study_folder("10000031", "50414261").with_suffix(".txt").unlink()
    small_mimic.add_report("10000032", "50414262", "x" * (1 << 20) + "x")
    small_mimic.write_tables()
    first, second = (reason for _, _, reason in read(small_mimic).skipped)
    assert "missing or unreadable report" in first
    assert second == "report larger than 1048576 bytes"


def test_report_that_is_not_utf8_is_kept_and_counted(small_mimic):
    small_mimic.add_report("10000031", "50414261", "IMPRESSION: Sj\xf6gren.".encode("latin-1"))
    small_mimic.write_tables()
    manifest = read(small_mimic)
    assert manifest.rows.set_index("study_id")["report"]["50414261"] == "Sjögren."
    assert manifest.rules["not_utf8"] == 1
    assert manifest.warnings == ["1 reports are not UTF-8: they were read as Latin-1"]


def test_reports_from_a_zip_are_read_in_place(small_mimic, tmp_path):
    small_mimic.write_tables()
    archive = tmp_path / "mimic-cxr-reports.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(5):
            name = f"files/p10/p1000003{number}/s5041426{number}.txt"
            file.writestr(name, REPORT.format(number=number))
        file.writestr("../../escaped/p10000035/s50414265.txt", REPORT.format(number="outside"))
        file.writestr("/absolute.txt", "x")
    before = sorted(tmp_path.rglob("*"))
    manifest = read_mimic_cxr(small_mimic.root, archive)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent.parent / "escaped").exists()
    reports = manifest.rows.set_index("study_id")["report"]
    assert reports["50414260"].startswith("Left effusion 0.") and len(reports) == 6


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_and_missing_zip_member(small_mimic, tmp_path, method):
    small_mimic.write_tables()
    archive = tmp_path / "reports.zip"
    with zipfile.ZipFile(archive, "w", method) as file:
        for number in range(5):
            file.writestr(f"files/p10/p1000003{number}/s5041426{number}.txt", f"Number {number}.")
        member = file.getinfo("files/p10/p10000033/s50414263.txt")
    content = bytearray(archive.read_bytes())
    # The member's data follow a header of 30 bytes and its name.
    start = member.header_offset + 30 + len(member.filename)
    content[start : start + member.compress_size] = b"\xff" * member.compress_size
    archive.write_bytes(content)
    reasons = {
        image: reason for image, _, reason in read_mimic_cxr(small_mimic.root, archive).skipped
    }
    assert "unreadable report in the archive" in reasons["3a2b-c3"]
    assert reasons["5a2b-c5"] == "no report in the archive"


def test_sections_file_replaces_the_reports(small_mimic, tmp_path):
    small_mimic.write_tables()
    lines = ["study,impression,findings,last_paragraph,comparison"]
    lines += [f"s5041426{n},Impression {n}.,Findings {n}.,,None" for n in range(3)]
    lines += ["s50414263,,Findings ____.,,", "s50414264,,,Last words.,"]
    lines += ["s50414264,,,The same study again.,"]
    sections = tmp_path / "mimic_cxr_sectioned.csv"
    sections.write_text("\n".join(lines))
    manifest = read_mimic_cxr(small_mimic.root, None, sections=sections)
    reports = manifest.rows.set_index("study_id")["report"]
    assert reports["50414261"] == "Impression 1. Findings 1."
    assert reports["50414263"] == "Findings ___." and reports["50414264"] == "Last words."
    assert manifest.skipped[0][2] == "no row in the sections file"
    assert manifest.rules == {"impression_findings": 3, "findings": 1, "last_paragraph": 1}
    assert "mimic_cxr_sectioned.csv has 1 rows of studies" in manifest.warnings[0]


def test_patient_in_two_splits_is_an_error(small_mimic):
    small_mimic.add_study("10000030", "50999999", "zz", split="test")
    small_mimic.write_tables()
    with pytest.raises(ValueError, match="1 of 6 patients are in more than one split"):
        read(small_mimic)


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("metadata", "dicom_id"),
        ("metadata", "subject_id"),
        ("metadata", "study_id"),
        ("metadata", "ViewPosition"),
        ("split", "dicom_id"),
        ("split", "split"),
        ("chexpert", "study_id"),
    ],
)
def test_missing_column_names_file_and_column(small_mimic, table, column):
    small_mimic.write_tables()
    path = small_mimic.root / f"mimic-cxr-2.0.0-{table}.csv"
    header, _, rest = path.read_text().partition("\n")
    names = ["other" if name == column else name for name in header.split(",")]
    path.write_text(",".join(names) + "\n" + rest)
    message = rf"{table}\.csv: missing column {column}; found {names[0]}, {names[1]}"
    with pytest.raises(ValueError, match=message):
        read(small_mimic)


@pytest.mark.parametrize("column", ["study", "impression", "findings"])
def test_missing_column_of_the_sections_file(small_mimic, tmp_path, column):
    small_mimic.write_tables()
    sections = tmp_path / "mimic_cxr_sectioned.csv"
    header = "study,impression,findings,last_paragraph,comparison".replace(column, "other", 1)
    sections.write_text(f"{header}\ns50414260,Clear.,,,\n")
    with pytest.raises(ValueError, match=rf"sectioned\.csv: missing column {column}; found"):
        read_mimic_cxr(small_mimic.root, None, sections=sections)


def test_missing_table_two_tables_and_a_table_that_is_no_table(small_mimic):
    small_mimic.write_tables()
    split = small_mimic.root / "mimic-cxr-2.0.0-split.csv"
    (small_mimic.root / "mimic-cxr-2.1.0-split.csv").write_bytes(split.read_bytes())
    with pytest.raises(ValueError, match="expected one split table, found"):
        read(small_mimic)
    (small_mimic.root / "mimic-cxr-2.1.0-split.csv").unlink()
    split.rename(split.with_suffix(".csv.gz"))
    with pytest.raises(ValueError, match=r"split\.csv\.gz: not a readable CSV table"):
        read(small_mimic)
    split.with_suffix(".csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a table mimic-cxr-\*-split\.csv or"):
        read(small_mimic)


def test_missing_folders_are_named(small_mimic, tmp_path):
    small_mimic.write_tables()
    with pytest.raises(FileNotFoundError, match=r"images: .*nowhere is not a directory"):
        read_mimic_cxr(tmp_path / "nowhere", small_mimic.root)
    with pytest.raises(FileNotFoundError, match=r"reports: .*nowhere is neither"):
        read_mimic_cxr(small_mimic.root, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"reports: .*is not a ZIP archive"):
        read_mimic_cxr(small_mimic.root, small_mimic.root / "mimic-cxr-2.0.0-split.csv")
    with pytest.raises(ValueError, match="reports: expected a directory or ZIP"):
        read_mimic_cxr(small_mimic.root, None)
