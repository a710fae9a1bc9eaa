import gzip

import numpy as np
import pytest

from mpma_train.data.csv_pairs import read_csv_pairs
from mpma_train.data.manifest import split_by_patient


def write(tmp_path, *lines, encoding="utf-8"):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_reads_all_columns(tmp_path):
    path = write(
        tmp_path,
        "image_path,report_content,patient_id,study_id,split,view,labels",
        'a.png,"FINAL REPORT\n\n FINDINGS: Clear.\n\n IMPRESSION: Normal.",p1,s1,train,PA,',
        "b.png,Small effusion.,p2,s2,val,AP,Pleural Effusion|Edema",
    )
    rows = read_csv_pairs(path).rows
    assert rows["report"].tolist() == ["Normal. Clear.", "Small effusion."]
    assert rows["split"].tolist() == ["train", "validate"]
    assert rows["patient_id"].tolist() == ["p1", "p2"] and rows["study_id"].tolist() == ["s1", "s2"]
    assert rows["path"].tolist() == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert rows["label/Edema"].tolist() == [0, 1] and rows["label/Edema"].dtype == np.float32


def test_label_columns(tmp_path):
    path = write(
        tmp_path,
        "image_path,report_content,Edema,label/Other thing",
        "a.png,One.,-1,1.0",
        "b.png,Two.,,0",
    )
    rows = read_csv_pairs(path).rows
    np.testing.assert_array_equal(rows["label/Edema"], [-1, np.nan])
    np.testing.assert_array_equal(rows["label/Other thing"], [1, 0])


@pytest.mark.parametrize("cell", ["yes", "2", "True"])
def test_label_that_is_none_is_named(tmp_path, cell):
    header = "image_path,report_content,Edema"
    path = write(tmp_path, header, "a.png,One.,1", f"b.png,Two.,{cell}")
    with pytest.raises(
        ValueError, match=rf"pairs\.csv: column 'Edema', row 2: a label must be 1 .*got '{cell}'"
    ):
        read_csv_pairs(path)


@pytest.mark.parametrize("gone", ["image_path", "report_content"])
def test_missing_column_is_named(tmp_path, gone):
    header = "image_path,report_content".replace(gone, "other")
    with pytest.raises(ValueError, match=rf"pairs\.csv: missing column {gone}; found"):
        read_csv_pairs(write(tmp_path, header, "a,b"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file"):
        read_csv_pairs(tmp_path / "no.csv")


def test_empty_file_is_no_table(tmp_path):
    (tmp_path / "pairs.csv").write_text("")
    with pytest.raises(ValueError, match="not a readable CSV table"):
        read_csv_pairs(tmp_path / "pairs.csv")


@pytest.mark.parametrize("rows", [["a.png,One.,p"], ["a.png,One.", "b.png,Two.,p"]])
def test_rows_longer_than_the_header_are_not_shifted_or_cut(tmp_path, rows):
    path = write(tmp_path, "image_path,report_content", *rows)
    with pytest.raises(ValueError, match=r"pairs\.csv: not a readable CSV table"):
        read_csv_pairs(path)


def test_damaged_gzip_is_no_table(tmp_path):
    content = bytearray(gzip.compress(b"image_path,report_content\n" + b"a.png,One.\n" * 1000))
    content[20:30] = b"\xff" * 10
    path = tmp_path / "pairs.csv.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.csv\.gz: not a readable CSV table"):
        read_csv_pairs(path)


def test_what_is_skipped_has_a_reason(tmp_path):
    path = write(
        tmp_path,
        "image_path,report_content,split",
        "a.png,One.,train",
        "a.png,One.,train",
        "b.png,,train",
        "c.png,   ,train",
        "d.png,Four.,later",
        ",Five.,train",
    )
    manifest = read_csv_pairs(path)
    assert manifest.rows["image_id"].tolist() == ["a.png"]
    assert [(image, reason) for image, _, reason in manifest.skipped] == [
        ("a.png", "duplicate row: the image is listed twice"),
        ("b.png", "empty report"),
        ("c.png", "empty report"),
        ("d.png", "split 'later', expected train, validate, test"),
        ("line 7", "blank image_path"),
    ]


def test_latin1_csv_is_read(tmp_path):
    path = write(tmp_path, "image_path,report_content", "a.png,Sjögren.", encoding="latin-1")
    manifest = read_csv_pairs(path)
    assert manifest.rows["report"].tolist() == ["Sjögren."]
    assert "pairs.csv is not UTF-8: it was read as Latin-1" in manifest.warnings


def test_missing_patient_identifier_is_warned_of(tmp_path):
    path = write(tmp_path, "image_path,report_content,study_id", "a.png,One.,s1", "b.png,Two.,s1")
    manifest = read_csv_pairs(path)
    assert "no column patient_id" in manifest.warnings[0]
    assert manifest.rows["patient_id"].tolist() == ["s1", "s1"]
    given = write(tmp_path, "image_path,report_content,patient_id", "a.png,One.,p")
    assert not read_csv_pairs(given).warnings
    blank = write(tmp_path, "image_path,report_content,patient_id", "a.png,One.,", "b.png,Two.,p")
    assert "1 rows of pairs.csv have a blank patient_id" in read_csv_pairs(blank).warnings[0]


def test_columns_that_are_not_used_are_warned_of(tmp_path):
    header = "image_path,report_content,patient_id,effusion,age,Edema,label/Other"
    warnings = read_csv_pairs(write(tmp_path, header, "a.png,One.,p,1,40,1,0")).warnings
    assert warnings == [
        "pairs.csv: not used: column effusion, age; a column of labels is called label/<Name> or "
        "by a CheXpert name"
    ]


def test_split_is_by_patient_seeded_and_eighty_ten_ten(tmp_path):
    lines = [f"{i}.png,Report {i}.,p{i // 3}" for i in range(300)]
    path = write(tmp_path, "image_path,report_content,patient_id", *lines)
    rows = read_csv_pairs(path, seed=3).rows
    assert (rows.groupby("patient_id")["split"].nunique() == 1).all()
    patients = rows.drop_duplicates("patient_id")["split"].value_counts().to_dict()
    assert patients == {"train": 80, "validate": 10, "test": 10}
    np.testing.assert_array_equal(rows["split"], read_csv_pairs(path, seed=3).rows["split"])
    assert (rows["split"] != read_csv_pairs(path, seed=4).rows["split"]).any()
    backwards = split_by_patient(rows["patient_id"][::-1], 3)[::-1]
    np.testing.assert_array_equal(rows["split"], backwards)


def test_patient_in_two_splits_is_an_error(tmp_path):
    path = write(
        tmp_path,
        "image_path,report_content,patient_id,split",
        "a.png,One.,p,train",
        "b.png,Two.,p,test",
    )
    with pytest.raises(ValueError, match="1 of 1 patients are in more than one split"):
        read_csv_pairs(path)
