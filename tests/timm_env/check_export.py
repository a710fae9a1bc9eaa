"""An exported image encoder in timm. Runs in the environment of make_env.py."""

import json

import pytest
import timm
import torch

from mpma_train.cli import main
from mpma_train.models import MpmaConfig, MpmaForPreTraining

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "text_hidden_size": 32,
    "text_num_hidden_layers": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 32,
    "vocab_size": 120,
    "fusion_layers": 1,
    "memory_slots": 8,
    "memory_topk": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# Another order of the same float32 sums (our attention against timm's).
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def exported(tmp_path, config):
    """Our model with random values everywhere, and what timm makes of its export."""
    torch.manual_seed(0)
    model = MpmaForPreTraining(config).eval()
    for parameter in model.model.image_encoder.parameters():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "mpma")
    argv = ["export", "--to", "timm", "--model", tmp_path / "mpma", "--out", tmp_path / "timm"]
    assert main(list(map(str, argv))) == 0
    # As the card tells its reader to.
    code = (tmp_path / "timm/README.md").read_text().split("```")[1].removeprefix("python")
    names = {}
    exec(code.replace('"DIR"', repr(str(tmp_path / "timm"))), names)
    vit = names["model"].eval()
    return model, vit


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_features_are_equal(tmp_path, pooling, eps):
    config = MpmaConfig(pooling=pooling, layer_norm_eps=eps, **SMALL, **SHAPE)
    model, vit = exported(tmp_path, config)
    pixels = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        ours = model.get_image_features(pixels)
        torch.testing.assert_close(vit.forward_features(pixels), ours.last_hidden_state, **CLOSE)
        torch.testing.assert_close(vit(pixels), ours.pooler_output, **CLOSE)


def test_encoder_that_is_timms_own(tmp_path, capsys):
    shape = {
        "patch_size": 16,
        "image_size": 32,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 192,
    }
    config = MpmaConfig(image_encoder="timm/test_vit", **(SMALL | shape))
    model, vit = exported(tmp_path, config)
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        ours = model.get_image_features(pixels).last_hidden_state
        torch.testing.assert_close(vit.forward_features(pixels), ours, **CLOSE)
    argv = ["export", "--to", "transformers-vit", "--model", str(tmp_path / "mpma")]
    assert main([*argv, "--out", str(tmp_path / "vit")]) == 2
    assert "use --to timm" in capsys.readouterr().err


def test_timms_own_weights_convert(tmp_path):
    """`mpma convert` on a state dict as timm itself writes it."""
    settings = {"img_size": 16, "patch_size": 4, "in_chans": 3, "num_classes": 3}
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_base_patch16_224", **settings, **sizes).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    config = tmp_path / "config.yaml"
    text = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    config.write_text(json.dumps(text | {"num_attention_heads": 4}))
    argv = ["convert", "--image", tmp_path / "vit.pth", "--out", tmp_path / "mpma"]
    argv += ["--config", config, "--image_mean", 0.5, 0.5, 0.5, "--image_std", 0.5, 0.5, 0.5]
    assert main(list(map(str, argv))) == 0
    model = MpmaForPreTraining.from_pretrained(tmp_path / "mpma").eval()
    pixels = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        ours = model.get_image_features(pixels).last_hidden_state
        theirs = vit.forward_features(pixels.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # three channels summed in one
    account = json.loads((tmp_path / "mpma/conversion.json").read_text())["image_encoder"]
    assert account["unused"] == ["head.bias", "head.weight"] and not account["missing"]
