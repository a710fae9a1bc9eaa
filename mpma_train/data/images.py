"""Reads a radiograph from disk and brings it to the store's form: grey, 8 bits, square.

JPEG and PNG go through Pillow, DICOM through pydicom (optional). Sixteen-bit data is windowed in
numpy, as Pillow's own conversion to 8 bits clips at 255 instead of scaling.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000


class UnreadableImageError(ValueError):
    """An image that is left out; the message is the reason, without the file's name."""


def read_image(path: Path | str, side: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a JPEG, PNG or DICOM file as a grey square, uint8 (side, side).

    Raises UnreadableImageError with a reason for a missing, truncated, oversized or foreign file.
    An image of more than `max_pixels` is refused from its header, before it is decoded.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise UnreadableImageError(f"missing or unreadable file ({error.strerror})") from None
    if not head:
        raise UnreadableImageError("empty file")
    if head[128:] == b"DICM":
        grey = _read_dicom(path, max_pixels)
    else:
        grey = _read_raster(path, side, max_pixels)
    return fit_square(grey, side)


def fit_square(grey: np.ndarray, side: int) -> np.ndarray:
    """Scales uint8 (H, W) so that its longer side is `side` and pads the other with black, centred.

    Padding rather than cropping: a cropped costophrenic angle or apex takes its finding with it.
    """
    height, width = grey.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    scaled = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(scaled)
    return square


def window(values: np.ndarray) -> np.ndarray:
    """Maps real values linearly, from their own smallest and largest one, to uint8 0..255."""
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise UnreadableImageError("pixel values are not finite")
    if high == low:
        return np.zeros(values.shape, dtype=np.uint8)
    return np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UnreadableImageError(f"image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"{width} x {height} pixels are more than the limit of {max_pixels} pixels"
        )


def _read_raster(path: Path, side: int, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            _check_size(*image.size, max_pixels)
            if image.mode.startswith(("I", "F")):
                return window(np.asarray(image))
            # Lets the JPEG decoder leave out resolution nobody will see: several times faster.
            # Twice the target keeps the resize below a true antialiased one.
            image.draft("L", (2 * side, 2 * side))
            return np.asarray(image.convert("L"))
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more pixels than Pillow decodes ({error})") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImageError("not a JPEG, PNG or DICOM image") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImageError(f"damaged image ({error})") from None


def _read_dicom(path: Path, max_pixels: int) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise UnreadableImageError(
            "DICOM needs pydicom 3 or newer: pip install 'mpma[dicom]'"
        ) from None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        form = str(header.get("PhotometricInterpretation", "none"))
        if form not in ("MONOCHROME1", "MONOCHROME2"):
            raise UnreadableImageError(f"DICOM of form {form}, expected MONOCHROME1 or MONOCHROME2")
        if int(header.get("NumberOfFrames", 1) or 1) != 1:
            raise UnreadableImageError("DICOM with several frames, expected one radiograph")
        _check_size(int(header.Columns), int(header.Rows), max_pixels)
        data = pydicom.dcmread(path)
        values = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data)
    except UnreadableImageError:
        raise
    except Exception as error:  # pydicom and its decoders raise many unrelated types
        raise UnreadableImageError(f"damaged DICOM ({type(error).__name__}: {error})") from None
    grey = window(values)
    return 255 - grey if form == "MONOCHROME1" else grey
