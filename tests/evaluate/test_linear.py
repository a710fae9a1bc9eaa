"""The linear probe end to end on a tiny model."""

import numpy as np
import pytest
import torch

from mpma_train.data.store import Store
from mpma_train.evaluate import linear
from mpma_train.evaluate.features import image_features, load_subject
from mpma_train.evaluate.linear import labelled_rows, pixel_features, summarise


def test_result_has_the_agreed_names_and_repeats(arguments):
    result = linear.evaluate(arguments())
    macro = {"auroc_1", "auroc_10", "auroc_100", "auroc_1_std", "auroc_10_std"}
    labels = {f"auroc_{p}/{name}" for p in (1, 10, 100) for name in ("Edema", "Fracture")}
    assert set(result.metrics) == macro | labels
    assert set(result.baselines) == {"chance", "untrained", "pixels"}
    for name in ("untrained", "pixels"):
        assert set(result.baselines[name]) == macro | labels
    measured = {"auroc_1", "auroc_10", "auroc_100"} | labels  # chance has no deviation
    assert result.baselines["chance"] == dict.fromkeys(measured, 0.5)
    assert result.n == 20  # every image, also of one study
    assert result.details["labels_left_out"] == ["Pneumonia"]
    assert linear.evaluate(arguments()) == result
    assert linear.evaluate(arguments(seed=1)).metrics != result.metrics  # other rows are drawn
    # bright corners part the pixels without an error
    assert result.baselines["pixels"]["auroc_100"] == 1
    # an untrained model saved with seed 0 is its own untrained baseline
    assert result.metrics == result.baselines["untrained"]


def test_pixels_are_area_means(store):
    rows = store.rows("test")[:3]
    found = pixel_features(store, rows).reshape(3, 32, 32)
    expected = store.images[rows].reshape(3, 32, 2, 32, 2).mean(axis=(2, 4)) / 255
    torch.testing.assert_close(found, expected, check_dtype=False)  # float32's tolerance


def test_summary_of_draws_by_hand():
    areas = {1: np.array([[0.5, 0.7], [0.7, 0.9], [0.6, 0.8]]), 100: np.array([[0.9, 1.0]])}
    numbers = summarise(areas, ["a", "b"])
    assert numbers["auroc_1"] == pytest.approx(0.7)
    assert numbers["auroc_1_std"] == pytest.approx(0.1)
    assert numbers["auroc_1/b"] == pytest.approx(0.8)
    assert numbers["auroc_100"] == pytest.approx(0.95)
    assert "auroc_100_std" not in numbers


def test_rows_without_any_label_are_left_out(store_path):
    store = Store(store_path)
    first = store.rows("test")[0]
    store.pairs.loc[first, ["label/Edema", "label/Fracture"]] = np.nan
    rows, targets, names, _ = labelled_rows(store)
    assert first not in rows["test"]
    assert len(rows["test"]) == len(targets["test"]) == 19
    assert names == ["Edema", "Fracture"]


def test_labels_that_cannot_be_probed_are_errors(arguments, unlabelled_path, store_path):
    with pytest.raises(ValueError, match=r"expected labels in split 'train'.*labels: none"):
        linear.evaluate(arguments(data=str(unlabelled_path)))
    store = Store(store_path)
    store.pairs.loc[store.rows("test"), ["label/Edema", "label/Fracture"]] = 1.0
    with pytest.raises(ValueError, match=r"no label of .* Edema, Fracture, Pneumonia"):
        labelled_rows(store)


def test_other_splits_are_refused(arguments):
    with pytest.raises(ValueError, match="measures on test, got 'validate'"):
        linear.evaluate(arguments(split="validate"))


def test_features_belong_to_their_rows(model_path, store_path):
    features = {}
    for batch_size in (1, 7):
        subject = load_subject(str(model_path), str(store_path), batch_size=batch_size, seed=0)
        rows = subject.store.rows("test")[::-1]
        features[batch_size] = image_features(subject, subject.model, rows)
    torch.testing.assert_close(features[1], features[7])
    batch = next(subject.batches("test", [3, 0]))
    direct = subject.model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(features[7][[-4, -1]], direct.detach().numpy())
