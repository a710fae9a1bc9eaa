import pytest
import torch
from small_model import NO_DROPOUT, SMALL, build, make_batch

from mpma_train.models import MpmaForPreTraining, MpmaModel

FUSIONS = ("memory", "kv_concat", "cross_attention", "gap_add")


def all_features(model, batch):
    text = (batch["input_ids"], batch["attention_mask"])
    return (
        *model.get_image_features(batch["pixel_values"]).to_tuple(),
        *model.get_text_features(*text, batch["word_ids"]).to_tuple(),
        *model.get_fused_features(batch["pixel_values"], *text).to_tuple(),
    )


def same_bits(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("training", [False, True])
def test_two_calls_are_bit_equal_in_both_modes(batch, training):
    model = build(**NO_DROPOUT).train(training)
    with torch.no_grad():
        assert same_bits(all_features(model, batch), all_features(model, batch))


@pytest.mark.parametrize("training", [False, True])
def test_features_use_every_patch(batch, training):
    model = build(**NO_DROPOUT).train(training)
    pixels = batch["pixel_values"].requires_grad_()
    features = model.get_image_features(pixels)
    assert features.last_hidden_state.shape == (4, 17, SMALL["hidden_size"])
    # Weighted, since the sum of a LayerNorm's output is constant.
    weights = torch.linspace(-1, 1, SMALL["hidden_size"])
    (features.pooler_output @ weights).sum().backward()
    assert (pixels.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(4, 5)) > 0).all()


def test_shapes_and_norms(model, batch):
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"], batch["word_ids"])
    fused = model.get_fused_features(batch["pixel_values"], batch["input_ids"])
    assert image.pooler_output.shape == (4, 32) and image.local_embeds.shape == (4, 16, 16)
    assert text.last_hidden_state.shape == (4, 14, 24) and text.pooler_output.shape == (4, 24)
    assert text.local_embeds.shape == (4, 14, 16)
    assert fused.last_hidden_state.shape == (4, 14, 32) and fused.pooler_output.shape == (4, 32)
    for embeds in (image.embeds, text.embeds):
        assert embeds.shape == (4, 16)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4))
    assert torch.equal(text.local_mask, batch["word_ids"] >= 0)
    assert torch.equal(fused.pooler_output, fused.last_hidden_state[:, 0])
    padding = batch["attention_mask"] == 0
    assert not text.last_hidden_state[padding].any() and not fused.last_hidden_state[padding].any()


def test_pooling_names_the_state_that_stands_for_the_image(batch):
    mean, cls = build(pooling="mean").eval(), build(pooling="cls").eval()
    states = mean.get_image_features(batch["pixel_values"])
    torch.testing.assert_close(states.pooler_output, states.last_hidden_state[:, 1:].mean(dim=1))
    states = cls.get_image_features(batch["pixel_values"])
    assert torch.equal(states.pooler_output, states.last_hidden_state[:, 0])


def test_text_pooling_names_the_state_that_stands_for_the_report(batch):
    for pooling in ("cls", "mean"):
        model = build(text_pooling=pooling).eval()
        text = model.get_text_features(batch["input_ids"])
        fused = model.get_fused_features(batch["pixel_values"], batch["input_ids"])
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for features in (text, fused):
                states = features.last_hidden_state[row, :length]
                expected = states[0] if pooling == "cls" else states.mean(dim=0)
                torch.testing.assert_close(features.pooler_output[row], expected)


def test_both_image_sizes_are_served(model, batch):
    large = batch["pixel_values"]
    small = torch.nn.functional.avg_pool2d(large, 2)
    both = [model.get_image_features(x).last_hidden_state for x in (large, small)]
    assert torch.equal(*both)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_packed_reports_equal_reports_alone_without_padding(fusion, batch):
    model = build(fusion=fusion).eval()
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    fused = model.get_fused_features(batch["pixel_values"], batch["input_ids"])
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids, image = batch["input_ids"][row : row + 1, :length], batch["pixel_values"][row][None]
        alone = model.get_text_features(ids)
        together = model.get_fused_features(image, ids)
        # float32 sums of a few dozen terms in another order.
        close = {"rtol": 1e-5, "atol": 1e-5}
        states = text.last_hidden_state[row, :length]
        torch.testing.assert_close(states, alone.last_hidden_state[0], **close)
        states = fused.last_hidden_state[row, :length]
        torch.testing.assert_close(states, together.last_hidden_state[0], **close)


def test_packed_text_equals_bert_as_transformers_runs_it(batch):
    from transformers import BertModel

    model = build().eval()
    bert = model.model.text_encoder.bert
    config = model.config.bert_config()
    config._attn_implementation = "eager"
    plain = BertModel(config, add_pooling_layer=False).eval()
    plain.load_state_dict(bert.state_dict())
    expected = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    found = model.get_text_features(batch["input_ids"]).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_image_reaches_the_masked_copy_only(fusion, batch):
    model = build(fusion=fusion, **NO_DROPOUT).eval()
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    seen = []
    model.model.text_features = lambda text, states, words, own=model.model.text_features: (
        seen.append(states) or own(text, states, words)
    )
    with torch.no_grad():
        first, second = model(**batch), model(**other)
    assert torch.equal(*seen)
    assert (first.report_loss_per_sample != second.report_loss_per_sample).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_saved_and_loaded_gives_the_same_bits(fusion, batch, tmp_path):
    model = build(fusion=fusion, local_alignment="max").eval()
    model.save_pretrained(tmp_path)
    loaded = MpmaForPreTraining.from_pretrained(tmp_path).eval()
    settings = model.config.setting_names()
    assert all(getattr(loaded.config, s) == getattr(model.config, s) for s in settings)
    with torch.no_grad():
        assert same_bits(all_features(model, batch), all_features(loaded, batch))
        assert same_bits(model(**batch).to_tuple(), loaded(**batch).to_tuple())
        body = MpmaModel.from_pretrained(tmp_path).eval()
        assert same_bits(all_features(model, batch), all_features(body, batch))
    assert (tmp_path / "model.safetensors").is_file()


def test_without_alignment_there_are_no_embeds(batch):
    model = build(global_alignment=False, local_alignment="none").eval()
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"])
    assert image.embeds is None and image.local_embeds is None
    assert text.embeds is None and text.local_embeds is None and text.local_mask is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(4, 1, 24, 24)}, r"pixel_values must be .*\(B, 1, 32, 32\)"),
        ({"pixel_values": torch.zeros(4, 3, 32, 32)}, r"got \(4, 3, 32, 32\)"),
        ({"pixel_values": torch.zeros(4, 1, 32, 32, dtype=torch.uint8)}, "floating point, got"),
        ({"pixel_values": torch.zeros(3, 1, 32, 32)}, "3 images and 4 reports"),
        ({"input_ids": torch.zeros(4, 14, dtype=torch.int32)}, "input_ids must be .*int32"),
        ({"input_ids": torch.zeros(56, dtype=torch.int64)}, r"input_ids must be \(B, T\)"),
        ({"input_ids": torch.full((4, 14), 60)}, "input_ids: .*below vocab_size 60.*4 of 4"),
        ({"attention_mask": torch.ones(4, 13)}, "attention_mask must have the shape of input_ids"),
        ({"attention_mask": torch.zeros(4, 14)}, "each report must have a real token.*4 of 4"),
        ({"attention_mask": torch.eye(14)[:4]}, "on the right"),
        ({"word_ids": torch.zeros(4, 2, dtype=torch.int64)}, "word_ids must have the shape"),
        ({"mask_seed": torch.zeros(3, dtype=torch.int64)}, r"mask_seed must be \(4,\)"),
        ({"mask_seed": torch.zeros(4)}, "mask_seed must be .*got .*float32"),
        ({"report_ids": torch.zeros(4, 1, dtype=torch.int64)}, "report_ids must be"),
    ],
)
def test_inputs_that_do_not_fit_are_named(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model(**(batch | change))


def test_reports_that_are_too_long_are_refused(model):
    batch = make_batch((33, 4))
    with pytest.raises(ValueError, match="max_position_embeddings 32 tokens a report, got 33"):
        model(**batch)


def test_what_is_fixed_stays_fixed_after_loading(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded, info = MpmaForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    fixed, expected = (
        {name for name, p in m.named_parameters() if not p.requires_grad} for m in (loaded, model)
    )
    assert fixed == expected and len(fixed) == 2
