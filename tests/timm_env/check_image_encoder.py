"""A timm vision transformer as the image encoder. Runs in the environment of make_env.py."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mpma_ext.integrations.timm import MpmaAttention
from mpma_train.models import MpmaConfig, MpmaForPreTraining

NAME = "vit_tiny_patch16_224"
SETTINGS = {
    "image_encoder": f"timm/{NAME}",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "text_hidden_size": 24,
    "text_num_hidden_layers": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 32,
    "vocab_size": 200,
    "fusion_layers": 1,
    "memory_slots": 8,
    "memory_topk": 2,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "image_mask_ratio": 0.5,
}


def build(**changes):
    torch.manual_seed(0)
    return MpmaForPreTraining(MpmaConfig(**(SETTINGS | changes)))


def test_trains_and_sees_the_patches_it_is_told():
    model = build()
    encoder = model.model.image_encoder
    assert any(isinstance(m, MpmaAttention) for m in encoder.modules())
    pixels = torch.randn(2, 1, 64, 64)
    ids = torch.tensor([[101, 7, 8, 102], [101, 9, 102, 0]])
    model(pixels, ids).loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    encoder.eval()
    image = F.avg_pool2d(pixels, 2)
    every = torch.arange(4).expand(2, -1)
    assert torch.equal(encoder(image, every), encoder(image))
    other = image.clone()
    other[:, :, 16:, 16:] += 1  # patch 3
    assert encoder(image, every[:, :3]).shape == (2, 4, 192)
    assert torch.equal(encoder(image, every[:, :3]), encoder(other, every[:, :3]))
    assert not torch.equal(encoder(image), encoder(other))


def test_saved_and_loaded_gives_the_same_bits(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = MpmaForPreTraining.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 1, 64, 64)
    features = [m.get_image_features(pixels).last_hidden_state for m in (model, loaded)]
    assert torch.equal(*features)


def test_starts_from_timms_own_values():
    """transformers' generic ones would draw the weights again, and with another deviation."""
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, num_classes=0, img_size=32, in_chans=1).state_dict()
    ours = build(initializer_range=0.5).model.image_encoder.vit.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_positions_are_timms_and_learned():
    encoder = build().model.image_encoder
    assert encoder.vit.pos_embed.shape == (1, 1 + 4, 192) and encoder.vit.pos_embed.requires_grad
    image = torch.zeros(1, 1, 32, 32)
    few, others = (encoder(image, torch.tensor([patches])) for patches in ([0, 1], [2, 3]))
    assert not torch.equal(few, others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, r"hidden_size must be that of timm's .*, 192; got 96"),
        ({"patch_size": 8}, r"patch_size must be that of timm's .*, 16; got 8"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers must be that of timm's .*, 12; got 2"),
        ({"num_attention_heads": 4}, r"num_attention_heads must be that of timm's .*, 3; got 4"),
        ({"intermediate_size": 64}, r"intermediate_size must be that of timm's .*, 768; got 64"),
        ({"layer_norm_eps": 1e-5}, r"layer_norm_eps must be that of timm's .*, 1e-06; got 1e-05"),
        ({"image_encoder": "timm/resnet18"}, "no vision transformer resnet18"),
        ({"image_encoder": "timm/vit_small_patch16_18x2_224"}, "not built of plain blocks"),
        ({"image_encoder": "timm/vit_base_patch16_siglip_224"}, "one class token"),
        ({"image_encoder": "timm/no_such_model"}, "no vision transformer no_such_model"),
    ],
)
def test_must_fit_the_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
