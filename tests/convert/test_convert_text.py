"""mpma convert on text encoders, and with the store that a model is to be trained on."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from sources import (
    SMALL_MODEL,
    WORDS,
    bert,
    bert_config,
    vit_mae,
    vit_mae_states,
    write_vocabulary,
)

from mpma_train.cli import main
from mpma_train.data.store import Store
from mpma_train.models import MpmaForPreTraining, MpmaProcessor

# Another order of the same float32 sums (packed attention against eager), two layers deep.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL_IMAGE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
HEADS = {"text_num_attention_heads": 4}


def reports():
    torch.manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([9, 4])[:, None]).long()
    return torch.randint(1, 100, mask.shape) * mask, mask


def write_pretraining(folder):
    """BertForPreTraining's directory: `bert.` before every name, and heads beside."""
    bert(head=True).save_pretrained(folder)
    return folder


def write_plain(folder):
    bert().save_pretrained(folder)
    return folder


def write_tensorflow_names(folder):
    """The first ports: gamma and beta, pickled, no config.json."""
    folder.mkdir()
    state = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in bert().state_dict().items()
    }
    assert any(name.endswith("gamma") for name in state)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("write", [write_pretraining, write_plain, write_tensorflow_names])
def test_features_equal_the_source(tmp_path, convert, write):
    source = bert(head=write is write_pretraining)
    source = getattr(source, "bert", source)
    settings = SMALL_IMAGE | (HEADS if write is write_tensorflow_names else {})
    model, printed = convert("--text", write(tmp_path / "bert"), **settings)
    ids, mask = reports()
    with torch.no_grad():
        expected = source(ids, attention_mask=mask).last_hidden_state
        got = model.get_text_features(ids, mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    assert "37 of 37 tensors filled" in printed
    assert "unused" in printed and "pooler.dense.weight" in printed
    assert ("cls.predictions.bias" in printed) == (write is write_pretraining)


def test_tokenizer_comes_along_with_one_word_more(tmp_path, convert):
    folder = write_plain(tmp_path / "bert")
    write_vocabulary(folder)
    model, printed = convert("--text", folder, **SMALL_IMAGE)
    words = model.model.text_encoder.bert.embeddings.word_embeddings.weight
    assert len(words) == WORDS + 1 and model.config.special_token_ids == [WORDS]
    assert torch.equal(words[:WORDS], bert().embeddings.word_embeddings.weight)
    assert "1 new ones added" in printed
    processor = MpmaProcessor.from_pretrained(tmp_path / "converted")
    ids = processor(text="word5 ___")["input_ids"].tolist()
    assert ids == [[101, 5, WORDS, 102]]


def test_eps_of_the_checkpoints_norms_is_kept(tmp_path, convert):
    """One so large that the states tell it apart."""
    source = bert(layer_norm_eps=0.5)
    source.save_pretrained(tmp_path / "bert")
    model, _ = convert("--text", tmp_path / "bert", **SMALL_IMAGE)
    assert model.config.text_layer_norm_eps == 0.5
    ids, mask = reports()
    with torch.no_grad():
        expected = source(ids, attention_mask=mask).last_hidden_state
        got = model.get_text_features(ids, mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


def test_another_eps_than_the_checkpoints_is_refused(tmp_path, refused):
    folder = write_plain(tmp_path / "bert")
    argv = ["convert", "--text", folder, "--out", tmp_path / "out"]
    told = refused(*argv, **SMALL_IMAGE, text_layer_norm_eps=1e-6)
    assert "text_layer_norm_eps is 1e-06, the checkpoint's 1e-12" in told


def test_fewer_positions(tmp_path, convert):
    model, printed = convert(
        "--text", write_plain(tmp_path / "bert"), max_position_embeddings=16, **SMALL_IMAGE
    )
    table = model.model.text_encoder.bert.embeddings.position_embeddings.weight
    assert torch.equal(table, bert().embeddings.position_embeddings.weight[:16])
    assert "the first 16 of 24 rows" in printed


def test_bad_checkpoints_are_refused_by_name(tmp_path, refused):
    out = ["--out", tmp_path / "out"]
    folder = write_plain(tmp_path / "bert")
    path = tmp_path / "roberta"
    path.mkdir()
    save_file(bert().state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    assert "expected a BERT, got 'roberta'" in refused("convert", "--text", path, *out)
    told = refused("convert", "--image", folder, *out)
    assert "found nothing for embeddings.patch_embeddings.projection.weight" in told
    assert "its tensors are called embeddings.LayerNorm.bias" in told
    told = refused("convert", "--text", folder, *out, hidden_act="relu")
    assert "hidden_act is relu, the checkpoint's gelu" in told


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A BERT directory, and a synthetic store prepared with its tokenizer."""
    root = tmp_path_factory.mktemp("prepared")
    folder = write_plain(root / "bert")
    write_vocabulary(folder)
    argv = ["prepare", "synthetic", "--pairs", "32", "--side", "32", "--workers", "1"]
    assert main([*argv, "--tokenizer", str(folder), "--out", str(root / "store")]) == 0
    return folder, root / "store"


def test_both_encoders_for_a_store_and_pretrain_from_them(tmp_path, convert, prepared):
    folder, data = prepared
    source = vit_mae(channels=3)
    source.save_pretrained(tmp_path / "vit-mae")
    model, _ = convert("--image", tmp_path / "vit-mae", "--text", folder, "--data", data)

    store = Store(data)
    mean, std = store.meta["image_mean"], store.meta["image_std"]
    grey = torch.rand(1, 1, 16, 16)
    theirs = [
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ]
    with torch.no_grad():
        got = model.get_image_features((grey - mean) / std).last_hidden_state
    expected = vit_mae_states(source, (grey - theirs[0]) / theirs[1])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # values reach some tens

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"max_steps": 1, "per_device_train_batch_size": 2}))
    argv = ["pretrain", config, "--data", data, "--output_dir", tmp_path / "run"]
    argv += ["--model_name_or_path", tmp_path / "converted", "--max_length", 16]
    argv += ["--learning_rate", 0.0, "--use_cpu", "true", "--report_to", "none"]
    assert main(list(map(str, argv))) == 0
    trained = MpmaForPreTraining.from_pretrained(tmp_path / "run")
    # A learning rate of zero: what was converted is what was trained from.
    before, after = model.state_dict(), trained.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_store_with_other_words_is_refused(tmp_path, refused, prepared):
    _, data = prepared
    folder = tmp_path / "other"
    bert_config().save_pretrained(folder)
    save_file(bert().state_dict(), folder / "model.safetensors")
    write_vocabulary(folder)
    vocabulary = (folder / "vocab.txt").read_text().splitlines()
    vocabulary[5], vocabulary[6] = vocabulary[6], vocabulary[5]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    argv = ["convert", "--text", folder, "--data", data, "--out", tmp_path / "out"]
    told = refused(*argv, **SMALL_MODEL, **SMALL_IMAGE)
    assert "2 tokens of the text checkpoint" in told and "prepare it with --tokenizer" in told
