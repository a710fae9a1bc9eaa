import pytest
import torch
from small_model import SMALL, build

from mpma_train.models import MpmaConfig
from mpma_train.models.parameters import (
    get_parameter_groups,
    no_weight_decay,
    parameter_table,
)


@pytest.mark.parametrize("fusion", ["memory", "kv_concat", "gap_add"])
def test_what_is_decayed(fusion):
    model = build(fusion=fusion)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = get_parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups].count(0.0) == 1 and len(groups) == 2
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d)
    }
    assert by_decay[0.05] == matrices
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert by_decay[0.0] | by_decay[0.05] == trained
    assert not by_decay[0.0] & by_decay[0.05]
    assert by_decay[0.0] <= no_weight_decay(model)


def test_text_encoder_may_have_its_own_learning_rate():
    model = build()
    groups = get_parameter_groups(model, 0.05, text_learning_rate=1e-5)
    own = {id(p) for group in groups if group.get("lr") == 1e-5 for p in group["params"]}
    assert own == {id(p) for p in model.model.text_encoder.parameters()}
    assert len(groups) == 4
    assert all("lr" not in g for g in get_parameter_groups(model, 0.05))


def test_table_counts_every_parameter_without_allocating():
    model = build()
    table = dict(parameter_table(model.config))
    assert table["total"] == sum(p.numel() for p in model.parameters())
    assert table["total"] == sum(count for part, count in table.items() if part != "total")
    counts = sum(p.numel() for p in model.model.text_encoder.parameters())
    assert table["text encoder"] == counts
    without = dict(parameter_table(MpmaConfig(**SMALL, image_loss_weight=0)))
    assert without["image decoder"] == 0


def test_true_size():
    table = dict(parameter_table(MpmaConfig()))
    # ViT-B/16 on one channel, with its class token, positions and last norm.
    block = 4 * 768 * 769 + 768 * 3072 * 2 + 3072 + 768 + 4 * 768
    assert table["image encoder"] == 12 * block + (16 * 16 + 1) * 768 + 198 * 768 + 2 * 768
    assert 2.4e8 < table["total"] < 2.5e8
