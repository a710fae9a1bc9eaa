"""use_mpma_attention against timm's own attention. Runs in the environment of make_env.py."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention, LayerNorm
from timm.models.vision_transformer import VisionTransformer

from mpma_ext.integrations.timm import MpmaAttention, use_mpma_attention

# float64: both sides do the same sums in another order, so only rounding may differ.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def vit(**changes):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 3}
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    return VisionTransformer(**settings, **shape, **changes).double()


def layers(model):
    return [m for m in model.modules() if isinstance(m, Attention)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": True}, {"scale_attn_norm": True}, {"qkv_bias": False}, {"reg_tokens": 2}],
    ids=str,
)
def test_equals_timm(changes):
    theirs = vit(**changes)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = use_mpma_attention(copy.deepcopy(theirs))
    assert [type(m) for m in layers(ours)] == [MpmaAttention] * 2
    assert [type(m) for m in layers(theirs)] == [Attention] * 2
    pixels = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    weight = torch.randn(3, 3, dtype=torch.float64)
    outputs = [m(pixels) for m in (theirs, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    for output in outputs:
        (output * weight).sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_keeps_norms_gate_and_scale_of_a_layer():
    torch.manual_seed(0)
    theirs = Attention(
        32, num_heads=4, qk_norm=True, scale_norm=True, gated=True, norm_layer=LayerNorm
    ).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = use_mpma_attention(copy.deepcopy(theirs))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_attention_dropout_in_training_only():
    model = use_mpma_attention(vit(attn_drop_rate=0.5))
    pixels = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(pixels), model(pixels))
        model.eval()
        assert torch.equal(model(pixels), model(pixels))


def test_names_copies_and_a_second_call():
    model = vit()
    names = list(model.state_dict())
    assert use_mpma_attention(model) is model
    use_mpma_attention(model)
    assert list(model.state_dict()) == names
    assert isinstance(pickle.loads(pickle.dumps(model)).blocks[0].attn, MpmaAttention)


def test_model_by_name():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels)
        after = use_mpma_attention(model)(pixels)
    # float32, twelve layers: a few units in the last place a layer.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "asked"),
    [
        ({"is_causal": True}, "causal attention"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, r"an attn_mask \(5, 5\)"),
    ],
)
def test_masks_are_refused_by_name(keywords, asked):
    layer = use_mpma_attention(vit()).blocks[0].attn
    with pytest.raises(ValueError, match=f"MpmaAttention .* asked for {asked}"):
        layer(torch.randn(1, 5, 32, dtype=torch.float64), **keywords)


def test_nothing_to_replace():
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match="found none in ResNet"):
        use_mpma_attention(model)
