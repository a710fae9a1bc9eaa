"""mpma export: plain encoders with the features of ours, and the way back."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sources import SMALL, SMALL_MODEL, randomise, write_vocabulary
from transformers import AutoTokenizer, BertModel, ViTModel

from mpma_train.cli import main
from mpma_train.models import MpmaConfig, MpmaForPreTraining, MpmaProcessor
from mpma_train.models.processing_mpma import MpmaImageProcessor
from mpma_train.weights.vocabulary import checkpoint_tokenizer, token_settings

# Another order of the same float32 sums (our attention against SDPA's), two layers deep.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small MPMA model with random values everywhere, saved with its processor."""
    folder = tmp_path_factory.mktemp("source")
    write_vocabulary(folder)
    tokenizer = checkpoint_tokenizer(folder)
    text = {f"text_{name}": value for name, value in SMALL.items()}
    config = MpmaConfig(
        image_size=16,
        patch_size=4,
        max_position_embeddings=24,
        layer_norm_eps=1e-5,
        text_layer_norm_eps=1e-3,
        **SMALL,
        **text,
        **SMALL_MODEL,
        **token_settings(tokenizer),
    )
    model = randomise(MpmaForPreTraining(config))
    model.save_pretrained(folder / "mpma")
    MpmaProcessor(MpmaImageProcessor(32, 0.4, 0.2), tokenizer).save_pretrained(folder / "mpma")
    return folder / "mpma", model


def export(target, source, out):
    assert main(["export", "--to", target, "--model", str(source), "--out", str(out)]) == 0


def test_transformers_vit_gives_the_same_states(tmp_path, source):
    folder, model = source
    export("transformers-vit", folder, tmp_path / "vit")
    vit, loading = ViTModel.from_pretrained(
        tmp_path / "vit", add_pooling_layer=False, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixels = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = model.get_image_features(pixels).last_hidden_state
        torch.testing.assert_close(vit.eval()(pixels).last_hidden_state, expected, **CLOSE)
    preprocessing = json.loads((tmp_path / "vit/preprocessor_config.json").read_text())
    assert preprocessing["image_mean"] == [0.4] and preprocessing["image_std"] == [0.2]


def test_transformers_bert_gives_the_same_states(tmp_path, source):
    folder, model = source
    export("transformers-bert", folder, tmp_path / "bert")
    bert, loading = BertModel.from_pretrained(
        tmp_path / "bert", add_pooling_layer=False, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert bert.config._attn_implementation != "mpma"
    assert bert.config.architectures == ["BertModel"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    batch = tokenizer(["word1 word2 ___ word3", "word4"], padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model.get_text_features(**batch).last_hidden_state[real]
        got = bert.eval()(**batch).last_hidden_state[real]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("target", ["transformers-vit", "timm"])
def test_converting_an_export_restores_the_encoder(tmp_path, source, convert, target):
    folder, model = source
    export(target, folder, tmp_path / "exported")
    if target == "timm":
        recipe = json.loads((tmp_path / "exported/timm.json").read_text())
        settings = {
            "num_attention_heads": recipe["kwargs"]["num_heads"],
            "layer_norm_eps": recipe["layer_norm_eps"],
        }
        again, _ = convert("--image", tmp_path / "exported/model.safetensors", **settings)
    else:
        again, printed = convert("--image", tmp_path / "exported")
        assert "fold" not in printed
    assert again.config.vit_config().to_dict() == model.config.vit_config().to_dict()
    expected = model.model.image_encoder.state_dict()
    got = again.model.image_encoder.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_converting_an_exported_bert_restores_the_encoder(tmp_path, source, convert):
    folder, model = source
    export("transformers-bert", folder, tmp_path / "exported")
    again, _ = convert("--text", tmp_path / "exported", image_size=16, patch_size=4, **SMALL)
    assert again.config.vocab_size == model.config.vocab_size
    expected = model.model.text_encoder.state_dict()
    got = again.model.text_encoder.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_timm_state_has_its_names_and_fused_weights(tmp_path, source):
    folder, model = source
    export("timm", folder, tmp_path / "timm")
    state = load_file(tmp_path / "timm/model.safetensors")
    attention = model.model.image_encoder.layers[1].attention
    expected = torch.cat(
        [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    )
    assert torch.equal(state["blocks.1.attn.qkv.weight"], expected)
    assert np.isclose(json.loads((tmp_path / "timm/timm.json").read_text())["image_mean"], 0.4)


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        ("transformers-vit", ["(B, 1, 16, 16)", "mean (0.4,) and deviation (0.2,)", "patches"]),
        ("timm", ["(B, 1, 16, 16)", "mean (0.4,) and deviation (0.2,)", "patches", "timm.json"]),
        ("transformers-bert", ["at most 24 tokens", "[CLS], of the last states"]),
    ],
)
def test_card_says_what_goes_in_how_to_pool_and_what_is_not_allowed(
    tmp_path, source, target, facts
):
    folder, _ = source
    export(target, folder, tmp_path / "out")
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert all(fact in card for fact in [*facts, str(folder), "not for diagnosis"])
    assert "credentialed data such as MIMIC-CXR must not be shared" in card


@pytest.mark.parametrize(
    ("target", "pooled"),
    [
        ("transformers-vit", "the class token, after the last norm"),
        ("transformers-bert", "the mean of the tokens, [CLS] and [SEP] among them"),
    ],
)
def test_card_of_a_model_that_pools_otherwise_and_names_no_normalisation(
    tmp_path, source, target, pooled
):
    config = MpmaConfig.from_pretrained(source[0], pooling="cls", text_pooling="mean")
    MpmaForPreTraining(config).save_pretrained(tmp_path / "mpma")
    export(target, tmp_path / "mpma", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert pooled in card
    assert ("the normalisation is unknown here" in card) == (target == "transformers-vit")


@pytest.mark.parametrize("target", ["transformers-vit", "transformers-bert"])
def test_code_of_the_card_reads_the_export(tmp_path, source, target):
    folder, model = source
    export(target, folder, tmp_path / "out")
    code = (tmp_path / "out/README.md").read_text().split("```")[1].removeprefix("python")
    names = {}
    exec(code.replace('"DIR"', repr(str(tmp_path / "out"))), names)
    image = target == "transformers-vit"
    encoder = model.model.image_encoder if image else model.model.text_encoder.bert
    expected, got = encoder.state_dict(), names["model"].state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_nothing_is_overwritten(tmp_path, source, refused):
    folder, _ = source
    (tmp_path / "mine.txt").write_text("kept")
    told = refused("export", "--to", "timm", "--model", folder, "--out", tmp_path)
    assert "not an empty directory" in told
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_models_are_refused(tmp_path, source, refused):
    told = refused("export", "--to", "timm", "--model", tmp_path / "no", "--out", tmp_path / "out")
    assert "model: no such directory" in told
    folder = shutil.copytree(source[0], tmp_path / "relu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    told = refused("export", "--to", "timm", "--model", folder, "--out", tmp_path / "out")
    assert "expected hidden_act gelu, got 'relu'" in told
    (folder / "config.json").write_text(json.dumps(config | {"memory_slots": 9}))
    told = refused("export", "--to", "timm", "--model", folder, "--out", tmp_path / "out")
    assert "another size model.fusion.memory.memory (8, 32) for (9, 32)" in told
