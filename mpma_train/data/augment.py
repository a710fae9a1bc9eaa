"""Light augmentation of images, and the order of a report's sentences.

No flips and no large rotations: left and right are words of the report.
"""

import re

import numpy as np

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Enough to keep a few thousand pairs from being learned by heart, too little to hide a finding.
_CONTRAST = 0.1
_BRIGHTNESS = 0.05
_NOISE = 0.02


def augment_image(
    image: np.ndarray, generator: np.random.Generator, *, max_shift: int
) -> np.ndarray:
    """Shift by up to `max_shift` pixels, change contrast and brightness a little, add noise.

    Args:
        image: float32 (side, side), grey values in [0, 1].
        generator: where the randomness comes from.
        max_shift: largest shift along each axis in pixels; what comes in repeats the edge.

    Returns:
        float32 (side, side) in [0, 1].
    """
    down, right = generator.integers(-max_shift, max_shift + 1, size=2)
    side = np.arange(image.shape[0])
    rows = np.clip(side - down, 0, image.shape[0] - 1)
    columns = np.clip(np.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
    contrast = 1 + generator.uniform(-_CONTRAST, _CONTRAST)
    brightness = generator.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    shifted = image[np.ix_(rows, columns)]
    mean = shifted.mean()
    out = generator.standard_normal(shifted.shape, dtype=np.float32)
    out *= np.float32(_NOISE)
    out += (shifted - mean) * np.float32(contrast)
    out += mean + np.float32(brightness)
    return np.clip(out, 0, 1, out=out)


def shuffle_sentences(report: str, generator: np.random.Generator) -> str:
    """The report's sentences in random order; one ends at `.`, `!` or `?` before white space."""
    sentences = _SENTENCE_END.split(report.strip())
    return " ".join(sentences[i] for i in generator.permutation(len(sentences)))
