import importlib.util

import pytest
import torch
import torch.nn.functional as F
from small_model import SMALL
from transformers import ViTMAEModel

from mpma_train.models import MpmaConfig
from mpma_train.models.image_encoder import build_image_encoder, fold_channels, two_resolutions


def test_folded_channels_give_equal_outputs_on_a_grey_image():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    grey = torch.rand(2, 1, 16, 16, generator=generator, dtype=torch.float64)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    colour = (grey - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    folded = fold_channels(weight, bias, mean, std, 0.48, 0.27)
    assert folded[0].shape == (6, 1, 4, 4) and folded[1].shape == (6,)
    found = F.conv2d((grey - 0.48) / 0.27, *folded, stride=4)
    # The means of three float32 literals are read in single precision on the left side only.
    torch.testing.assert_close(
        found, F.conv2d(colour.double(), weight, bias, stride=4), rtol=1e-6, atol=1e-5
    )


def test_folding_needs_one_mean_a_channel():
    with pytest.raises(ValueError, match="must have 3 values, one a channel"):
        fold_channels(torch.zeros(2, 3, 4, 4), torch.zeros(2), (0.5,), (0.5,), 0.5, 0.5)


def test_encoder_equals_vit_mae_without_masking(model, batch):
    """Same names, same numbers: a ViTMAEModel takes the weights as they are."""
    config = model.config.vit_config()
    config.mask_ratio = 0.0
    config._attn_implementation = "eager"
    plain = ViTMAEModel(config).eval()
    encoder = model.model.image_encoder
    plain.load_state_dict(encoder.state_dict())
    image = F.avg_pool2d(batch["pixel_values"], 2)
    # Noise that sorts to the patches' own order: ViT-MAE shuffles even where it drops nothing.
    noise = torch.arange(16.0).expand(4, -1)
    expected = plain(image, noise=noise).last_hidden_state
    torch.testing.assert_close(encoder(image), expected, rtol=1e-5, atol=1e-5)


def test_visible_patches_keep_their_positions(model, batch):
    encoder = model.model.image_encoder
    image = F.avg_pool2d(batch["pixel_values"], 2)
    every = torch.arange(16).expand(4, -1)
    assert torch.equal(encoder(image, every), encoder(image))
    few = torch.tensor([[0, 3, 7], [1, 2, 3], [4, 8, 15], [5, 6, 7]])
    other = image.clone()
    other[0, :, 4:8, :4] += 1  # patch 4 of the first image, which is not among its visible ones
    assert torch.equal(encoder(image, few), encoder(other, few))
    moved = torch.tensor([[0, 3, 8], [1, 2, 3], [4, 8, 15], [5, 6, 7]])
    assert not torch.equal(encoder(image, few)[0], encoder(image, moved)[0])


def test_positions_are_fixed_and_tell_every_place_apart(model):
    for positions in (
        model.model.image_encoder.embeddings.position_embeddings[0],
        model.image_decoder.positions,
    ):
        assert not positions.requires_grad
        assert len(positions.unique(dim=0)) == 17
        # The column comes first: rows of one column share the first half.
        half = positions.shape[1] // 2
        assert torch.equal(positions[1, :half], positions[5, :half])
        assert torch.equal(positions[1, half:], positions[2, half:])


def test_target_is_the_large_image_or_the_small_one_enlarged():
    config = MpmaConfig(**SMALL)
    large = torch.randn(2, 1, 32, 32)
    seen, target = two_resolutions(large, config)
    assert torch.equal(target, large)
    torch.testing.assert_close(seen[0, 0, 0, 0], large[0, 0, :2, :2].mean())
    small = torch.full((2, 1, 16, 16), 3.0)
    seen, target = two_resolutions(small, config)
    assert seen is small and target.shape == (2, 1, 32, 32)
    torch.testing.assert_close(target, torch.full_like(target, 3.0))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_asked_for_by_name():
    config = MpmaConfig(**(SMALL | {"image_encoder": "timm/vit_tiny_patch16_224"}))
    with pytest.raises(ImportError, match=r'timm/vit_tiny_patch16_224.*pip install "mpma\[timm\]"'):
        build_image_encoder(config)
