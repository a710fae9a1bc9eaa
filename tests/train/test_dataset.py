import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mpma_train.data.collator import PairCollator
from mpma_train.data.dataset import PairDataset
from mpma_train.data.sampler import StudySampler
from mpma_train.data.store import Store
from mpma_train.pretrain import build_model
from mpma_train.settings import parse_settings


@pytest.fixture(scope="module")
def store(store_path):
    return Store(store_path)


@pytest.fixture(scope="module")
def processor(store, config_path):
    return build_model(parse_settings([str(config_path)]), store)[1]


def same(one, two):
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_items_are_a_function_of_seed_epoch_and_sample(store):
    dataset = PairDataset(store, "train", shuffle_sentences=True, augment=True, seed=1)
    again = PairDataset(store, "train", shuffle_sentences=True, augment=True, seed=1)
    again[5], again[17]
    key = 3 * len(dataset) + 9
    assert same(dataset[key], again[key])
    other_epoch, other_seed = dataset[9], PairDataset(store, "train", augment=True, seed=2)[key]
    for other in (other_epoch, other_seed):
        assert other["mask_seed"] != dataset[key]["mask_seed"]
        assert not np.array_equal(other["image"], dataset[key]["image"])
        assert other["report_id"] == dataset[key]["report_id"]
    seeds = {dataset[key]["mask_seed"] for key in range(3 * len(dataset))}
    assert len(seeds) == 3 * len(dataset)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_without_augmentation_an_item_is_what_the_store_holds(store):
    dataset = PairDataset(store, "validate")
    for index, row in enumerate(store.rows("validate")):
        pair = dataset[index]
        np.testing.assert_array_equal(pair["image"], store.images[row] / np.float32(255))
        assert pair["report"] == store.pairs["report"][row]


def test_reports_have_one_number_a_text(store):
    dataset = PairDataset(store, "train")
    numbers = {}
    for index in range(len(dataset)):
        pair = dataset[index]
        assert numbers.setdefault(pair["report"], pair["report_id"]) == pair["report_id"]
    # 8 of the 64 studies have a second image, with the same report.
    assert len(dataset) == 72 and len(set(numbers.values())) == 64


def test_shuffled_pairs_exchange_reports_only(store):
    plain, control = PairDataset(store, "train"), PairDataset(store, "train", shuffle_pairs=True)
    assert all(plain[i]["report"] != control[i]["report"] for i in range(len(plain)))
    assert {plain[i]["report"] for i in range(len(plain))} == {
        control[i]["report"] for i in range(len(plain))
    }
    assert same({"image": plain[3]["image"]}, {"image": control[3]["image"]})
    # Both images of a study have the same new report.
    assert control[0]["report"] == control[1]["report"]


def test_batches_do_not_depend_on_workers(store, processor):
    def batches(workers):
        dataset = PairDataset(store, "train", shuffle_sentences=True, augment=True, seed=0)
        sampler = StudySampler(dataset.study_ids, seed=0)
        sampler.epoch = 2
        collator = PairCollator(processor, max_length=48)
        return list(
            DataLoader(dataset, 16, sampler=sampler, collate_fn=collator, num_workers=workers)
        )

    none, two = batches(0), batches(2)
    assert len(none) == len(two) == 4
    for one, other in zip(none, two, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_collator_gives_the_models_inputs(store, processor):
    dataset = PairDataset(store, "train")
    batch = PairCollator(processor, max_length=10)([dataset[i] for i in (0, 2, 30)])
    assert set(batch) == {
        "pixel_values",
        "input_ids",
        "attention_mask",
        "word_ids",
        "mask_seed",
        "report_ids",
    }
    assert batch["pixel_values"].shape == (3, 1, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    # The store's mean 0.5 and deviation 0.29 normalise grey values in [0, 1].
    expected = (torch.from_numpy(dataset[30]["image"]) - 0.5) / 0.29
    torch.testing.assert_close(batch["pixel_values"][2, 0], expected)
    for name in ("input_ids", "attention_mask", "word_ids"):
        assert batch[name].shape == (3, 10) and batch[name].dtype == torch.int64
    assert batch["mask_seed"].tolist() == [dataset[i]["mask_seed"] for i in (0, 2, 30)]
    assert batch["report_ids"].tolist() == [dataset[i]["report_id"] for i in (0, 2, 30)]


def test_an_empty_split_is_an_error(store):
    with pytest.raises(ValueError, match="split: expected one with pairs, got 'test'"):
        PairDataset(store, "test")
