"""mpma convert on image encoders: the features must be those of the encoder they came from."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file
from sources import MAE_DECODER, SMALL, fixed_positions, mae_state, vit_mae, vit_mae_states

# Another order of the same float32 sums (attention of mpma_ext against eager), two layers deep.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = {"num_attention_heads": 4}


def image_states(model, pixels):
    with torch.no_grad():
        return model.get_image_features(pixels).last_hidden_state


def write_mae(path, source, **more):
    torch.save({"model": mae_state(source) | MAE_DECODER, **more}, path)
    return path


def write_transformers(path, source):
    source.save_pretrained(path)
    return path


def write_new_names(path, source):
    """As transformers names its parameters in memory."""
    path.mkdir()
    save_file(source.state_dict(), path / "model.safetensors")
    source.config.save_pretrained(path)
    return path


def write_timm(path, source):
    save_file(mae_state(source) | {"head.weight": torch.zeros(3, 32)}, path)
    return path


@pytest.mark.parametrize(
    ("write", "name", "settings"),
    [
        (write_mae, "mae.pth", HEADS),
        (write_transformers, "vit-mae", {}),
        (write_new_names, "new", {}),
        (write_timm, "timm.safetensors", HEADS),
    ],
)
def test_one_channel_features_equal_the_source(tmp_path, convert, write, name, settings):
    source = vit_mae(channels=1)
    path = write(tmp_path / name, source)
    model, printed = convert("--image", path, **settings)
    pixels = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(image_states(model, pixels), vit_mae_states(source, pixels), **CLOSE)
    total = len(source.vit.state_dict())
    assert f"{total} of {total} tensors filled" in printed


def test_every_unused_and_missing_key_is_named(tmp_path, convert):
    source = vit_mae(channels=1)
    state = mae_state(source) | MAE_DECODER
    del state["norm.bias"], state["blocks.1.attn.qkv.bias"]
    path = tmp_path / "mae.pth"
    torch.save({"model": state}, path)
    _, printed = convert("--image", path, **HEADS)
    account = json.loads((tmp_path / "converted/conversion.json").read_text())["image_encoder"]
    missing = {f"layers.1.attention.{letter}_proj.bias" for letter in "qkv"} | {"layernorm.bias"}
    assert set(account["missing"]) == missing
    assert set(account["unused"]) == set(MAE_DECODER)
    for name in missing | set(MAE_DECODER):
        assert name in printed


@pytest.mark.parametrize("given", ["assumed", "preprocessor", "named"])
def test_three_channels_fold_into_one(tmp_path, convert, given):
    """A grey image, normalised as either side wants it, gives equal features."""
    source = vit_mae(channels=3)
    path = write_transformers(tmp_path / "vit-mae", source)
    mean, std, more = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), []
    if given == "preprocessor":
        mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
        content = {"do_normalize": True, "image_mean": mean, "image_std": std}
        (path / "preprocessor_config.json").write_text(json.dumps(content))
    if given == "named":
        mean, std = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
        more = ["--image_mean", *mean, "--image_std", *std]
    model, printed = convert("--image", path, *more)
    assert "3 channels" in printed and ("ImageNet's assumed" in printed) == (given == "assumed")

    grey = torch.rand(2, 1, 16, 16)
    per_channel = [torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std)]
    expected = vit_mae_states(source, (grey - per_channel[0]) / per_channel[1])
    got = image_states(model, (grey - sum(mean) / 3) / (sum(std) / 3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # values reach some tens


def test_fixed_positions_are_recomputed_for_another_size(tmp_path, convert):
    path = write_transformers(tmp_path / "vit-mae", vit_mae(channels=1, image_size=16))
    model, printed = convert("--image", path, image_size=24)
    got = model.model.image_encoder.embeddings.position_embeddings
    torch.testing.assert_close(got.detach(), fixed_positions(6))
    assert "recomputed from 4 × 4 patches to 6 × 6" in printed


def test_learned_positions_are_interpolated(tmp_path, convert):
    source = vit_mae(channels=1)
    ramp = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 4, 32).reshape(1, 16, 32)
    source.vit.embeddings.position_embeddings.data[:, 1:] = ramp
    source.vit.embeddings.position_embeddings.data[:, 0] = 7
    path = write_mae(tmp_path / "mae.pth", source)
    model, printed = convert("--image", path, image_size=32, **HEADS)
    table = model.model.image_encoder.embeddings.position_embeddings[0]
    assert "interpolated from 4 × 4 patches to 8 × 8" in printed
    assert torch.equal(table[0], torch.full((32,), 7.0))
    rows = table[1:].view(8, 8, 32)
    # Constant along a row of patches, rising from row to row, in place at the middle.
    torch.testing.assert_close(rows, rows[:, :1].expand(8, 8, 32))
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all()
    torch.testing.assert_close(rows[3:5, 0, 0].mean(), torch.tensor(1.5))


def test_learned_positions_of_the_same_size_are_kept_and_named(tmp_path, convert):
    source = vit_mae(channels=1)
    torch.nn.init.normal_(source.vit.embeddings.position_embeddings)
    path = write_mae(tmp_path / "mae.pth", source)
    model, printed = convert("--image", path, **HEADS)
    pixels = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(image_states(model, pixels), vit_mae_states(source, pixels), **CLOSE)
    assert "learned positions, which training keeps" in printed


def test_class_token_without_a_position(tmp_path, convert):
    source = vit_mae(channels=1)
    state = mae_state(source)
    state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    save_file(state, tmp_path / "timm.safetensors")
    model, printed = convert("--image", tmp_path / "timm.safetensors", **HEADS)
    # The fixed table's class position is zero anyway.
    expected = source.vit.embeddings.position_embeddings
    assert torch.equal(model.model.image_encoder.embeddings.position_embeddings, expected)
    assert "a zero position added for the class token" in printed


def test_training_checkpoint_with_its_command_line(tmp_path, convert):
    source = vit_mae(channels=1)
    more = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    model, _ = convert("--image", write_mae(tmp_path / "checkpoint-3.pth", source, **more), **HEADS)
    assert torch.equal(model.model.image_encoder.layernorm.weight, source.vit.layernorm.weight)


def test_distributed_wrapper_is_seen_through(tmp_path, convert):
    source = vit_mae(channels=1)
    wrapped = {f"module.{n}": t for n, t in mae_state(source).items()}
    torch.save({"state_dict": wrapped}, tmp_path / "mae.bin")
    model, _ = convert("--image", tmp_path / "mae.bin", **HEADS)
    assert torch.equal(model.model.image_encoder.layernorm.bias, source.vit.layernorm.bias)


def test_what_is_new_depends_on_the_seed_alone(tmp_path, convert):
    path = write_transformers(tmp_path / "vit-mae", vit_mae(channels=1))
    first, again, other = (
        convert("--image", path, "--seed", seed, out=name)[0].model.fusion.state_dict()
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


def test_bad_checkpoints_are_refused_by_name(tmp_path, refused, capsys):
    source = vit_mae(channels=1)
    out = ["--out", tmp_path / "out"]

    def message(path, **settings):
        return refused("convert", "--image", path, *out, **settings)

    assert "no such file or directory" in message(tmp_path / "absent.pth")

    folder = tmp_path / "empty"
    folder.mkdir()
    assert "no weights in" in message(folder)

    path = tmp_path / "weights.h5"
    path.write_bytes(b"x")
    assert "expected one of .safetensors" in message(path)

    for name in ("damaged.safetensors", "damaged.pth"):
        path = tmp_path / name
        path.write_bytes(b"not a checkpoint")
        assert f"{name}: not readable" in message(path)

    path = tmp_path / "harmful.pth"
    torch.save({"model": Harmful()}, path)
    assert "weights_only" in message(path)

    path = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], path)
    assert "expected a dictionary of tensors" in message(path)

    path = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(2)}, path)
    assert "conv1.weight" in message(path)

    path = write_mae(tmp_path / "mae.pth", source)
    told = message(path, hidden_size=64, patch_size=8)
    assert "hidden_size is 64, the checkpoint's 32" in told
    assert "patch_size is 8, the checkpoint's 4" in told

    state = mae_state(source)
    state["blocks.1.mlp.fc2.weight"] = torch.zeros(3, 3)
    path = tmp_path / "shape.safetensors"
    save_file(state, path)
    told = message(path, **HEADS)
    assert "layers.1.mlp.fc2.weight (3, 3)" in told and "blocks.1.mlp.fc2.weight" in told

    path = write_transformers(tmp_path / "vit-mae", source)
    told = message(path, num_attention_heads=2)
    assert "num_attention_heads is 2, the checkpoint's 4" in told
    assert not (tmp_path / "out").exists()

    assert "--image PATH, --text PATH or both" in refused("convert", *out)
    assert "expected 1 values each" in refused(
        "convert", "--image", path, *out, "--image_mean", "0.5"
    )

    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.txt").write_text("mine")
    assert "not an empty directory" in message(path)


def test_sharded_directory(tmp_path, convert):
    source = vit_mae(channels=1)
    source.save_pretrained(tmp_path / "vit-mae", max_shard_size="20KB")
    assert (tmp_path / "vit-mae/model.safetensors.index.json").is_file()
    model, _ = convert("--image", tmp_path / "vit-mae")
    assert torch.equal(model.model.image_encoder.layernorm.weight, source.vit.layernorm.weight)


def test_shard_outside_the_directory_is_refused(tmp_path, refused):
    folder = tmp_path / "vit"
    folder.mkdir()
    index = {"weight_map": {"cls_token": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    told = refused("convert", "--image", folder, "--out", tmp_path / "out")
    assert "outside its directory" in told


def test_heads_are_64_wide_where_nothing_says_so(tmp_path, convert):
    wide = SMALL | {"hidden_size": 128, "num_attention_heads": 2}
    source = vit_mae(channels=1, **wide)
    model, _ = convert("--image", write_mae(tmp_path / "mae.pth", source))
    assert model.config.num_attention_heads == 2
