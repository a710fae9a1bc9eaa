"""A timm vision transformer as the image encoder. Runs in the environment of make_env.py."""

import pytest
import torch
import torch.nn.functional as F

from mpma_ext.integrations.timm import MpmaAttention
from mpma_train.models import MpmaConfig, MpmaForPreTraining

SETTINGS = {
    "image_encoder": "timm/vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 64,
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, r"hidden_size must be that of timm's .*, 192; got 96"),
        ({"patch_size": 8}, r"patch_size must be that of timm's .*, 16; got 8"),
        ({"image_encoder": "timm/resnet18"}, "no vision transformer resnet18"),
        ({"image_encoder": "timm/vit_base_patch16_siglip_224"}, "one class token"),
        ({"image_encoder": "timm/no_such_model"}, "no vision transformer no_such_model"),
    ],
)
def test_must_fit_the_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
