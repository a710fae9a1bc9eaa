"""Pairs of a prepared store, as a function of (seed, epoch, sample) and of nothing else."""

from typing import TypedDict

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from mpma_train.data.augment import augment_image, shuffle_sentences
from mpma_train.data.sampler import cyclic_partners
from mpma_train.data.seeding import stateless_generator, stateless_seed
from mpma_train.data.store import Store


class Pair(TypedDict):
    """One image and its report.

    Attributes:
        image: float32 (side, side), grey values in [0, 1].
        report: the report's text.
        report_id: equal for identical reports of the split.
        mask_seed: int64; decides both masks of the pair in this epoch.
    """

    image: np.ndarray
    report: str
    report_id: int
    mask_seed: int


class PairDataset(Dataset):
    """The pairs of one split, with an item for every key `epoch * len(dataset) + index`.

    Everything random in an item is a hash of (seed, epoch, image_id): the same in any worker, on
    any number of processes, and in a run that was resumed. Evaluation uses the keys of epoch 0.

    Args:
        store: the prepared store.
        split: "train", "validate" or "test".
        shuffle_sentences: put a report's sentences in a new order every epoch.
        augment: shift, contrast and noise, new every epoch.
        max_shift: largest shift in pixels of the store's images.
        shuffle_pairs: give every study the report of another one; a control.
        seed: the run's seed.

    Raises:
        ValueError: the split holds no pairs.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        *,
        shuffle_sentences: bool = False,
        augment: bool = False,
        max_shift: int = 2,
        shuffle_pairs: bool = False,
        seed: int = 0,
    ):
        # The same mapped memory without np.memmap's costly slicing.
        self._images = np.asarray(store.images)
        self._rows = store.rows(split)
        if len(self._rows) == 0:
            raise ValueError(f"split: expected one with pairs, got {split!r} of {store.path}")
        pairs = store.pairs.iloc[self._rows]
        self._image_ids = pairs["image_id"].tolist()
        self.study_ids = pairs["study_id"].tolist()
        reports = pairs["report"]
        if shuffle_pairs:
            reports = reports.iloc[cyclic_partners(self.study_ids, seed)]
        self._reports = reports.tolist()
        self._report_ids = pd.factorize(reports)[0]
        self._shuffle_sentences = shuffle_sentences
        self._augment = augment
        self._max_shift = max_shift
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_studies(self) -> int:
        """How many studies there are, and so pairs an epoch."""
        return len(set(self.study_ids))

    def __getitem__(self, key: int) -> Pair:
        epoch, index = divmod(key, len(self))
        image_id = self._image_ids[index]
        stored = self._images[self._rows[index]]
        if self._augment:
            generator = stateless_generator(self._seed, epoch, image_id, "augment")
            image = augment_image(stored, generator, max_shift=self._max_shift)
        else:
            image = stored / np.float32(255)
        report = self._reports[index]
        if self._shuffle_sentences:
            generator = stateless_generator(self._seed, epoch, image_id, "sentences")
            report = shuffle_sentences(report, generator)
        # The model takes a signed 64-bit seed: keep 63 bits.
        mask_seed = stateless_seed(self._seed, epoch, image_id, "mask") >> 1
        return Pair(
            image=image,
            report=report,
            report_id=int(self._report_ids[index]),
            mask_seed=mask_seed,
        )
