"""What a model starts from: where nothing normalises later, scales decide whether it learns."""

import math

import pytest
import torch
from small_model import build, make_batch

from mpma_train.models.layers import GainLinear
from mpma_train.models.text_encoder import initial_positions

WIDE = {
    "hidden_size": 128,
    "text_hidden_size": 96,
    "memory_slots": 64,
    "memory_topk": 8,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def wide():
    return build(fusion="kv_concat", **WIDE).eval()


def test_unit_gain_layers_have_unit_gain(wide):
    layers = {n: m for n, m in wide.named_modules() if isinstance(m, GainLinear)}
    assert len(layers) == 4 * 2 + 4  # two fusion blocks, four heads
    for name, layer in layers.items():
        # 16 * 96 weights or more: five standard errors of their deviation are below 10 %.
        gain = layer.weight.std().item() * layer.in_features**0.5
        assert gain == pytest.approx(1, abs=0.1), name
        assert not layer.bias.any(), name


def test_slots_start_with_unit_variance_in_use(wide):
    attention = wide.model.fusion.blocks[0].attention
    head_width = 128 // 4
    # 3 * 128 values: five standard errors of their deviation are 18 %.
    assert attention.slot_key.std().item() * head_width**0.5 == pytest.approx(1, abs=0.18)
    assert attention.slot_value.std().item() * 3**0.5 == pytest.approx(1, abs=0.18)


def test_single_vectors_and_temperature():
    model = build(fusion="memory", **WIDE)
    memory = model.model.fusion.memory
    assert memory.memory.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.alignment.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.image_decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.6)
    assert model.image_decoder.mask_token.any()
    assert model.model.image_encoder.embeddings.cls_token.any()


@pytest.fixture
def poisoned():
    """New memory holds NaN, where it may hold zeros by chance."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("fusion", ["memory", "kv_concat", "cross_attention", "gap_add"])
def test_every_parameter_gets_a_value(poisoned, fusion):
    model = build(fusion=fusion)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert not model.report_head.bias.any()


def test_memory_responds_and_heads_prefer_some_slots():
    model = build(**WIDE).eval()
    memory = model.model.fusion.memory
    states = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (read,), use = memory(states)
    response = (read - states).std() / states.std()
    # Slots that were all alike would respond with 1e-4 of the state, and give weights of 1/8 each.
    assert 0.1 < response < 1.5
    assert 0 < use.used_share <= 1 and 1 <= use.perplexity <= 64


def test_memory_use_counts_what_is_read():
    model = build(**(WIDE | {"memory_topk": 1})).eval()
    memory = model.model.fusion.memory
    state = torch.randn(1, 128)
    with torch.no_grad():
        _, use = memory(state.expand(50, -1))
    # One state reads one slot a head, four different ones unless heads agree.
    assert use.used_share * 64 == pytest.approx(round(float(use.perplexity)))
    assert use.used_share <= 4 / 64


def test_text_positions_start_as_sines_and_cosines():
    # From random ones, this encoder stayed at word frequencies for whole runs.
    table = build().model.text_encoder.bert.embeddings.position_embeddings.weight
    assert torch.equal(table, initial_positions(*table.shape, 0.01)) and table.requires_grad
    nearness = table @ table.T
    assert (nearness.diag(1) > nearness.diag(8).max()).all()
    assert table.std().item() == pytest.approx(0.01, rel=0.2)


def test_bert_has_a_deviation_of_its_own():
    model = build(**WIDE, initializer_range=0.08, text_initializer_range=0.03)
    bert = model.model.text_encoder.bert
    assert bert.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.03, rel=0.1)
    assert bert.embeddings.position_embeddings.weight.std().item() == pytest.approx(0.015, rel=0.2)
    assert bert.encoder.layer[0].intermediate.dense.weight.std().item() == pytest.approx(
        0.03, rel=0.1
    )
    hidden = model.model.alignment.text_global.hidden.weight
    assert hidden.std().item() == pytest.approx(0.08, rel=0.1)


def test_what_gap_add_adds_does_not_drown_the_words():
    model = build(fusion="gap_add", **WIDE).eval().model
    patches = torch.nn.functional.layer_norm(torch.randn(200, 1, 128), (128,))
    words = model.text_encoder.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        shift = model.fusion(patches)
    assert shift.std().item() == pytest.approx(words.std().item(), rel=0.2)


def test_first_loss_is_what_a_model_that_knows_nothing_has():
    model = build(**WIDE).eval()
    with torch.no_grad():
        output = model(**make_batch((20, 25, 30, 18) * 4))
    # Normalised patches have variance (q - 1) / q, and their mean is the best constant guess.
    assert output.loss_image.item() == pytest.approx(1, abs=0.2)
    assert output.loss_report.item() == pytest.approx(math.log(60), abs=0.2)
    # Sixteen equally likely partners; unrelated unit vectors of width 16 have cosines of 1 / 4,
    # times 14.3, which is why the first loss lies above.
    for loss in (output.loss_global, output.loss_local):
        assert math.log(16) - 0.5 < loss < 3 * math.log(16)
