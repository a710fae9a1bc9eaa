"""From radiographs and reports to the model's inputs; saved beside the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from mpma_train.data.images import fit_square, window
from mpma_train.data.store import Store
from mpma_train.models.configuration_mpma import MpmaConfig

Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]


class MpmaImageProcessor(BaseImageProcessor):
    """Grey squares, normalised with one mean and one deviation. Needs no torchvision.

    Args:
        size: side in pixels of what comes out: the model's target size.
        image_mean, image_std: of grey values in [0, 1].
    """

    def __init__(
        self, size: int = 448, image_mean: float = 0.5, image_std: float = 0.25, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, image_mean, image_std

    def preprocess(self, images: Images, **kwargs: Any) -> BatchFeature:
        """Normalised images.

        Args:
            images: one or several, of any size, longer side to `size` and padded with black to a
                square: PIL images, 16-bit ones windowed; or arrays (H, W), (1, H, W) or a batch of
                either: uint8, or floating grey values in [0, 1] that have the model's size.

        Returns:
            pixel_values float32 (B, 1, size, size).

        Raises:
            ValueError: an image of another shape or dtype, or an unknown keyword.
        """
        kwargs.pop("return_tensors", None)
        if kwargs:
            raise ValueError(f"images: unknown keywords {sorted(kwargs)}")
        grey = [self._grey(image) for image in _as_list(images)]
        side = (0, self.size, self.size)
        stacked = np.stack(grey) if grey else np.empty(side, dtype=np.float32)
        pixels = torch.from_numpy((stacked - self.image_mean) / self.image_std)
        return BatchFeature({"pixel_values": pixels.to(torch.float32).unsqueeze(1)})

    def _grey(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """One image as float32 (size, size) in [0, 1]."""
        if isinstance(image, Image.Image):
            wide = image.mode.startswith(("I", "F"))
            image = window(np.asarray(image)) if wide else np.asarray(image.convert("L"))
        expected = (
            "images: each must be a PIL image, uint8 (H, W) or (1, H, W), or floating point in "
            f"[0, 1] of ({self.size}, {self.size}); got "
        )
        if not isinstance(image, np.ndarray):
            raise ValueError(f"{expected}a {type(image).__name__}")
        if image.ndim == 3 and image.shape[0] == 1:
            image = image[0]
        fits = image.shape == (self.size, self.size)
        if image.ndim == 2 and image.size and image.dtype == np.uint8:
            square = image if fits else fit_square(image, self.size)
            return square.astype(np.float32) / np.float32(255)
        if fits and np.issubdtype(image.dtype, np.floating):
            return image.astype(np.float32, copy=False)
        raise ValueError(f"{expected}{image.dtype} {image.shape}")


class MpmaProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: an `MpmaImageProcessor`.
        tokenizer: a fast tokenizer with BERT's special tokens.
    """

    def __init__(self, image_processor: MpmaImageProcessor, tokenizer: PreTrainedTokenizerBase):
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_store(cls, store: Store, config: MpmaConfig) -> "MpmaProcessor":
        """For a model of this configuration, with a prepared store's tokenizer and grey values."""
        tokenizer = store.tokenizer()
        tokenizer.model_max_length = config.max_position_embeddings
        mean, std = store.meta["image_mean"], store.meta["image_std"]
        return cls(MpmaImageProcessor(config.target_size, mean, std), tokenizer)

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, *_: Any, **kwargs: Any) -> list[Any]:
        # transformers' own way goes through AutoImageProcessor, which insists on torchvision.
        image_processor = MpmaImageProcessor.from_pretrained(path, **kwargs)
        return [image_processor, AutoTokenizer.from_pretrained(path, **kwargs)]

    def __call__(
        self,
        images: Images | None = None,
        text: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> BatchFeature:
        """The model's inputs.

        Args:
            images: see `MpmaImageProcessor.preprocess`.
            text: one report or several.
            max_length: longest report in tokens, special ones included; the end is cut. The
                tokenizer's limit by default.

        Returns:
            What was asked for of: pixel_values float32 (B, 1, S, S); input_ids, attention_mask and
            word_ids int64 (B, T), padded to the longest report. word_ids number the words of a
            report, and are -1 where a token is never masked nor aligned.

        Raises:
            ValueError: neither images nor text, or one of them does not fit.
        """
        if images is None and text is None:
            raise ValueError("images, text: at least one of them must be given")
        inputs = {}
        if images is not None:
            inputs |= self.image_processor.preprocess(images)
        if text is not None:
            inputs |= self._reports([text] if isinstance(text, str) else list(text), max_length)
        return BatchFeature(inputs)

    def _reports(self, text: list[str], max_length: int | None) -> dict[str, Tensor]:
        wrong = [type(report).__name__ for report in text if not isinstance(report, str)]
        if wrong:
            raise ValueError(f"text: must be a string or a sequence of strings, got {wrong[0]}")
        if not text:
            empty = torch.zeros(0, 1, dtype=torch.int64)
            return dict.fromkeys(("input_ids", "attention_mask", "word_ids"), empty)
        encoded = self.tokenizer(
            text,
            padding=True,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        words = [encoded.word_ids(row) for row in range(len(text))]
        numbers = torch.tensor([[-1 if w is None else w for w in row] for row in words])
        special = torch.tensor(sorted(self.tokenizer.added_tokens_decoder))
        numbers[torch.isin(encoded["input_ids"], special)] = -1
        return {**encoded, "word_ids": numbers}


def _as_list(images: Images) -> list[Image.Image | np.ndarray]:
    """One image or a batch of them, as a list; tensors become arrays."""
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Tensor | np.ndarray):
        batch = images.ndim == 4 or (images.ndim == 3 and images.shape[0] != 1)
        images = list(images) if batch else [images]
    return [x.cpu().numpy() if isinstance(x, Tensor) else x for x in images]
