import io
import zlib

import numpy as np
import pydicom
import pytest
from mimic_layout import RAMP, ramp_jpeg, write_dicom
from PIL import Image

from mpma_train.data.images import UnreadableImageError, fit_square, read_image, window


def test_jpeg_is_scaled_to_the_longer_side_and_padded_centred(tmp_path):
    ramp_jpeg(tmp_path / "a.jpg", height=80, width=40)
    image = read_image(tmp_path / "a.jpg", 32)
    assert image.shape == (32, 32) and image.dtype == np.uint8
    assert (image[:, :8] == 0).all() and (image[:, 24:] == 0).all()
    assert (np.diff(image[16, 9:23].astype(int)) > 0).all()


def test_colour_becomes_grey(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 1] = 200
    Image.fromarray(colour).save(tmp_path / "a.png")
    # ITU-R 601 luma of pure green: 0.587 of its value.
    assert read_image(tmp_path / "a.png", 8)[4, 4] == pytest.approx(0.587 * 200, abs=1)


def test_sixteen_bit_png_is_windowed_not_clipped(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 32)
    expected = np.rint(RAMP / 4095 * 255)
    np.testing.assert_array_equal(image, expected)


def test_monochrome2_dicom(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP, "MONOCHROME2")
    np.testing.assert_array_equal(read_image(tmp_path / "a.dcm", 32), np.rint(RAMP / 4095 * 255))


def test_monochrome1_dicom_is_inverted(tmp_path):
    write_dicom(tmp_path / "a", 4095 - RAMP, "MONOCHROME1")
    upright = read_image(tmp_path / "a", 32).astype(int)
    # The inversion may round a half the other way.
    assert np.abs(upright - np.rint(RAMP / 4095 * 255)).max() <= 1


def test_dicom_window_is_applied(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP, "MONOCHROME2", WindowCenter=1024, WindowWidth=512)
    row = read_image(tmp_path / "a.dcm", 32)[0]
    assert row[RAMP[0] < 760].max() == 0 and row[RAMP[0] > 1290].min() == 255


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "expected MONOCHROME1 or MONOCHROME2"),
        ({"NumberOfFrames": 2}, "several frames"),
        ({"Rows": 40_000, "Columns": 40_000}, "more than the limit"),
        ({"PixelData": b"\0\0"}, "damaged DICOM"),
    ],
)
def test_dicom_that_is_refused(tmp_path, extra, message):
    write_dicom(tmp_path / "a.dcm", RAMP, "MONOCHROME2", **extra)
    with pytest.raises(UnreadableImageError, match=message):
        read_image(tmp_path / "a.dcm", 32)


def test_dicom_without_pydicom_says_how_to_get_it(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a.dcm", RAMP, "MONOCHROME2")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(UnreadableImageError, match=r"mpma\[dicom\]"):
        read_image(tmp_path / "a.dcm", 32)
    assert pydicom.__version__


def test_truncated_jpeg(tmp_path):
    ramp_jpeg(tmp_path / "a.jpg", 200, 200)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImageError, match=r"damaged image .*truncated"):
        read_image(tmp_path / "a.jpg", 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not a JPEG, PNG or DICOM image"),
        (b"GIF89a" + b"\0" * 200, "not a JPEG, PNG or DICOM image"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "damaged image|not a JPEG"),
    ],
)
def test_what_is_no_image(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=message):
        read_image(tmp_path / "a.jpg", 32)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UnreadableImageError, match="missing or unreadable file"):
        read_image(tmp_path / "no.jpg", 32)
    with pytest.raises(UnreadableImageError, match="missing or unreadable file"):
        read_image(tmp_path, 32)


def test_oversized_image_is_refused_without_decoding(tmp_path, monkeypatch):
    ramp_jpeg(tmp_path / "a.jpg", 50, 50)

    def decode(self):
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(
        UnreadableImageError, match="50 x 50 pixels are more than the limit of 2000"
    ):
        read_image(tmp_path / "a.jpg", 32, max_pixels=2000)


def test_a_bomb_that_pillow_itself_refuses(tmp_path):
    # A PNG header that claims 60,000 x 60,000 pixels, with no data behind it.
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match="more pixels than Pillow decodes"):
        read_image(tmp_path / "a.png", 32)


def test_window_of_a_constant_and_of_non_finite_values():
    assert (window(np.full((3, 3), 7.0)) == 0).all()
    with pytest.raises(UnreadableImageError, match="not finite"):
        window(np.array([[0.0, np.nan]]))


def test_fit_square_keeps_a_square_as_it_is():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(fit_square(image, 16), image)
