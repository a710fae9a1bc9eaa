"""Makes the model's inputs of a list of pairs."""

from collections.abc import Sequence

import numpy as np
import torch

from mpma_train.data.dataset import Pair
from mpma_train.models import MpmaProcessor


class PairCollator:
    """Normalises images and tokenises reports, a batch at a time.

    Args:
        processor: the model's own.
        max_length: longest report in tokens, special tokens included; the end is cut. The
            processor's own limit by default.
    """

    def __init__(self, processor: MpmaProcessor, *, max_length: int | None = None):
        self._processor = processor
        self._max_length = max_length

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Collate B pairs.

        Returns:
            pixel_values float32 (B, 1, S, S); input_ids, attention_mask, word_ids int64 (B, T),
            padded to the longest report; mask_seed and report_ids int64 (B,).
        """
        batch = self._processor(
            images=np.stack([pair["image"] for pair in pairs]),
            text=[pair["report"] for pair in pairs],
            max_length=self._max_length,
        )
        batch["mask_seed"] = torch.tensor([pair["mask_seed"] for pair in pairs])
        batch["report_ids"] = torch.tensor([pair["report_id"] for pair in pairs])
        return dict(batch)
