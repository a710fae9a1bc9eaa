"""What every evaluation starts from: a model, a store that fits it, and batches of its pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpma_train.data.collator import PairCollator
from mpma_train.data.dataset import PairDataset
from mpma_train.data.store import Store
from mpma_train.models import MpmaConfig, MpmaForPreTraining, MpmaProcessor
from mpma_train.weights.load import load_model


@dataclass(frozen=True)
class Subject:
    """A model under evaluation and the data it is measured on.

    Attributes:
        model: in evaluation mode, on a CUDA device where there is one.
        processor: the model's own, so that its tokenizer is used and not the store's.
        store: images of the model's target size.
        batch_size: pairs in a batch.
        seed: decides masks and untrained weights.
    """

    model: MpmaForPreTraining
    processor: MpmaProcessor
    store: Store
    batch_size: int
    seed: int

    def untrained(self) -> MpmaForPreTraining:
        """A model of the same configuration with fresh weights, decided by the seed."""
        config = MpmaConfig.from_dict(self.model.config.to_dict())
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = MpmaForPreTraining(config)
        return model.to(self.model.device).eval()

    def batches(
        self, split: str, items: Sequence[int] | np.ndarray | None = None, draw: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Inputs of the model's forward on its device, without augmentation.

        Args:
            split: name of a split.
            items: positions in the split, all by default.
            draw: masks change with it, and nothing else does.
        """
        pairs = PairDataset(self.store, split, seed=self.seed)
        collate = PairCollator(self.processor)
        items = range(len(pairs)) if items is None else items
        for start in range(0, len(items), self.batch_size):
            keys = [draw * len(pairs) + int(i) for i in items[start : start + self.batch_size]]
            batch = collate([pairs[key] for key in keys])
            yield {name: tensor.to(self.model.device) for name, tensor in batch.items()}


def load_subject(model: str, data: str, *, batch_size: int, seed: int) -> Subject:
    """Read a model directory and a prepared store that fits it.

    Raises:
        FileNotFoundError: a directory is missing.
        ValueError: the directory holds no MPMA model or weights that do not fit it, the store's
            images have another size, or the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    loaded = load_model(model)
    store = Store(data)
    config = loaded.config
    if store.side != config.target_size:
        raise ValueError(
            f"data: expected images of side {config.target_size} (image_size {config.image_size} × "
            f"target_scale {config.target_scale}), {data} was made for {store.side}; prepare it "
            f"again with --side {config.target_size}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = MpmaProcessor.from_pretrained(model)
    return Subject(loaded.to(device), processor, store, batch_size, seed)


@torch.no_grad()
def image_features(subject: Subject, model: MpmaForPreTraining, rows: np.ndarray) -> np.ndarray:
    """Pooled features of whole images, every patch seen.

    Args:
        subject: the store and how its images are prepared.
        model: the subject's or its untrained twin.
        rows: (n,) int64 rows of the store.

    Returns:
        (n, D) float32.
    """
    pooled = []
    for start in range(0, len(rows), subject.batch_size):
        images = subject.store.images[rows[start : start + subject.batch_size]]
        pixels = subject.processor(images=images)["pixel_values"].to(model.device)
        pooled.append(model.get_image_features(pixels).pooler_output)
    return torch.cat(pooled).float().cpu().numpy()
