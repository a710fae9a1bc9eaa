"""A small set in the published MIMIC-CXR-JPG layout, written by hand and not by the generator."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

METADATA_HEADER = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
    "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning"
)
CHEXPERT_HEADER = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,"
    "Fracture,Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,"
    "Pneumothorax,Support Devices"
)
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough  // eval for pneumonia

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___

 FINDINGS: 

 Small left pleural effusion {number}.  No pneumothorax.

 IMPRESSION: 

 Left effusion {number}.
"""
# Twelve bits, brighter to the right.
RAMP = np.tile(np.linspace(0, 4095, 32), (32, 1)).astype(np.uint16)


def ramp_jpeg(path: Path, height: int = 40, width: int = 30) -> None:
    """A grey JPEG that gets brighter to the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.linspace(0, 250, width).astype(np.uint8)
    Image.fromarray(np.tile(row, (height, 1))).save(path, quality=95)


def write_dicom(path: Path, values: np.ndarray, form: str, **extra) -> None:
    """A radiograph of 12 bits a pixel; `extra` sets further elements."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, form
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = values.tobytes()
    for name, value in extra.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


class MimicFolder:
    """Writes the layout row by row; `write_tables` last."""

    def __init__(self, root: Path):
        self.root = root
        self.metadata, self.split, self.labels = [], [], []

    def study_folder(self, subject: str, study: str) -> Path:
        return self.root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"

    def image_path(self, subject: str, study: str, dicom: str) -> Path:
        return self.study_folder(subject, study) / f"{dicom}.jpg"

    def add_image(
        self, dicom, subject, study, split="train", view="PA", meaning="postero-anterior"
    ) -> Path:
        self.metadata.append(
            f"{dicom},{subject},{study},CHEST (PA AND LAT),{view},3056,2544,21800506,213014.531,"
            f"CHEST (PA AND LAT),{meaning},Erect"
        )
        if split:
            self.split.append(f"{dicom},{study},{subject},{split}")
        path = self.image_path(subject, study, dicom)
        ramp_jpeg(path)
        return path

    def add_report(self, subject: str, study: str, content: bytes | str) -> Path:
        path = self.study_folder(subject, study).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def add_label(self, subject: str, study: str, **values: str) -> None:
        names = CHEXPERT_HEADER.split(",")[2:]
        cells = [values.get(name.replace(" ", "_"), "") for name in names]
        self.labels.append(",".join([subject, study, *cells]))

    def add_study(self, subject: str, study: str, dicom: str, split: str = "train") -> Path:
        self.add_report(subject, study, REPORT.format(number=study))
        self.add_label(subject, study, Pleural_Effusion="1.0", Pneumothorax="0.0", Pneumonia="-1.0")
        return self.add_image(dicom, subject, study, split)

    def write_tables(self, *, zipped: bool = False) -> Path:
        tables = {
            "metadata": [METADATA_HEADER, *self.metadata],
            "split": ["dicom_id,study_id,subject_id,split", *self.split],
            "chexpert": [CHEXPERT_HEADER, *self.labels],
        }
        for name, lines in tables.items():
            text = ("\n".join(lines) + "\n").encode()
            path = self.root / f"mimic-cxr-2.0.0-{name}.csv"
            if zipped:
                path.with_suffix(".csv.gz").write_bytes(gzip.compress(text))
            else:
                path.write_bytes(text)
        return self.root
