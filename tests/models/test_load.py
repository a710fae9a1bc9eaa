"""A model directory is read whole or refused by the names of its tensors."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import build

from mpma_train.models import MpmaConfig
from mpma_train.weights.load import load_model

MEMORY = "model.fusion.memory.memory"


@pytest.fixture
def folder(tmp_path):
    build(seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_is_loaded(folder):
    model = load_model(folder)
    assert not model.training
    expected = build(seed=3).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(MEMORY), f"lacks fitting weights for {MEMORY}"),
        (
            lambda weights: weights.update({MEMORY: torch.zeros(20, 31)}),
            f"has weights of another size {MEMORY} (20, 31) for (20, 32)",
        ),
        (
            lambda weights: weights.update({"model.extra": torch.zeros(2)}),
            "has weights without a place model.extra",
        ),
    ],
    ids=["missing", "of another size", "unexpected"],
)
def test_what_does_not_fit_is_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"^model: {re.escape(f'{folder} {message}')}$"):
        load_model(folder)


def test_weights_that_do_not_fit_the_settings(folder):
    """One message for all three: another fusion of another width."""
    config = MpmaConfig.from_pretrained(folder, fusion="kv_concat", projection_size=8)
    with pytest.raises(ValueError) as refused:
        load_model(folder, config, setting="start")
    lacking, sizes, unplaced = str(refused.value).removeprefix(f"start: {folder} ").split("; ")
    assert lacking.startswith("lacks") and "blocks.1.attention.slot_key" in lacking
    assert "another size" in sizes and "image_local.output.weight (16, 32) for (8, 32)" in sizes
    assert "without a place" in unplaced and MEMORY in unplaced


def test_a_damaged_file_is_no_traceback(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"model: weights in .* are not readable"):
        load_model(folder)
