"""The order of an epoch: every study once, one of its images each time."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from mpma_train.data.seeding import stateless_generator, stateless_seed


class StudySampler(Sampler[int]):
    """Yields keys `epoch * len(dataset) + index`, one image of every study, in a shuffled order.

    The order is a function of (seed, epoch) alone, and which image of a study is shown a hash of
    (seed, epoch, study). The epoch travels in the key, so a worker needs no state to know it; it is
    set by `EpochCallback` and not by a `set_epoch` method, because accelerate's own calls of that
    name start again from 0 in a resumed run and stop at the batch samplers that it wraps.

    Args:
        study_ids: study of every item of the dataset, in the dataset's order.
        seed: the run's seed.
    """

    def __init__(self, study_ids: Sequence[str], seed: int):
        self.seed = seed
        self.epoch = 0
        self.num_items = len(study_ids)
        images: dict[str, list[int]] = {}
        for index, study in enumerate(study_ids):
            images.setdefault(study, []).append(index)
        self._images = list(images.items())

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[int]:
        # Read once: a prefetching loader must not see the next epoch's number half way through.
        epoch = self.epoch
        order = stateless_generator(self.seed, epoch, "", "study order").permutation(len(self))
        for position in order:
            study, indices = self._images[position]
            chosen = 0
            if len(indices) > 1:
                chosen = stateless_seed(self.seed, epoch, study, "image of study") % len(indices)
            yield epoch * self.num_items + indices[chosen]


def cyclic_partners(study_ids: Sequence[str], seed: int) -> np.ndarray:
    """Item whose report each item is given when pairs are shuffled, as a control.

    Studies are put on one random cycle and each takes the report of the next, so that none keeps
    its own.

    Returns:
        int64 (len(study_ids),), indices into the items.

    Raises:
        ValueError: with fewer than two studies there is nothing to exchange.
    """
    first: dict[str, int] = {}
    for index, study in enumerate(study_ids):
        first.setdefault(study, index)
    if len(first) < 2:
        raise ValueError(f"shuffle_pairs needs at least two studies, the split has {len(first)}")
    studies = list(first)
    cycle = stateless_generator(seed, 0, "", "shuffled pairs").permutation(len(studies))
    partner = {
        studies[here]: first[studies[there]]
        for here, there in zip(cycle, np.roll(cycle, -1), strict=True)
    }
    return np.array([partner[study] for study in study_ids], dtype=np.int64)
