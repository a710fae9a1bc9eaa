import pytest
from small_model import SMALL
from transformers import AutoConfig

from mpma_train.models import MpmaConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusoin": "memory"}, r"unknown settings \['fusoin'\]; expected some of .*fusion"),
        ({"fusion": "concat"}, "'fusion' expected one of .*'gap_add'.*got concat"),
        ({"local_alignment": None}, "'local_alignment' expected one of"),
        ({"image_size": "64"}, "'image_size' expected int, got str"),
        ({"text_dropout": "0.1"}, "'text_dropout'"),
        ({"global_alignment": "yes"}, "'global_alignment' expected bool"),
        ({"special_token_ids": ["a"]}, "'special_token_ids'"),
        ({"image_size": 225}, "image_size must be a multiple of patch_size 16, got 225"),
        ({"hidden_size": 770}, "hidden_size must be a multiple of num_attention_heads 12"),
        ({"text_hidden_size": 100}, "text_hidden_size must be a multiple of text_num_attention"),
        ({"decoder_hidden_size": 90, "decoder_num_attention_heads": 9}, "a multiple of 4, got 90"),
        ({"image_mask_ratio": 1.0}, r"image_mask_ratio must be in \[0, 1\), got 1.0"),
        ({"text_mask_ratio": -0.1}, r"text_mask_ratio must be in \[0, 1\)"),
        ({"fusion_dropout": 1}, r"fusion_dropout must be in \[0, 1\)"),
        ({"hidden_act": "nope"}, "hidden_act must be one of .*gelu, .*relu, .*got 'nope'"),
        ({"memory_topk": 0}, "memory_topk must be positive, got 0"),
        ({"memory_slots": -5}, "memory_slots must be positive"),
        ({"temperature_init": 0}, "temperature_init must be positive"),
        ({"image_loss_weight": -1}, "image_loss_weight must be 0 or more"),
        ({"mask_token_id": 30522}, "mask_token_id must be below vocab_size 30522"),
        ({"special_token_ids": [40000]}, "special_token_ids must be ids below vocab_size"),
        ({"image_encoder": "timm/"}, 'image_encoder must be "vit" or "timm/<name>"'),
        ({"image_encoder": "resnet"}, 'image_encoder must be "vit" or "timm/<name>"'),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MpmaConfig(**settings)


def test_a_setting_changed_later_is_checked_too():
    config = MpmaConfig()
    with pytest.raises(ValueError, match="'fusion' expected one of"):
        config.fusion = "none"


def test_saved_and_loaded(tmp_path):
    config = MpmaConfig(**SMALL, local_alignment="max", text_dropout=0)
    config.save_pretrained(tmp_path)
    for loaded in (MpmaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MpmaConfig)
        for name in MpmaConfig.setting_names():
            assert getattr(loaded, name) == getattr(config, name), name
    changed = MpmaConfig.from_pretrained(tmp_path, fusion="gap_add")
    assert changed.fusion == "gap_add" and changed.local_alignment == "max"


def test_numbers_of_patches():
    config = MpmaConfig()
    assert (config.num_patches, config.num_masked_patches, config.target_size) == (196, 147, 448)
    # However high the ratio, one patch is seen.
    assert MpmaConfig(image_size=32, image_mask_ratio=0.99).num_masked_patches == 3


def test_special_tokens_are_never_targets():
    config = MpmaConfig(**SMALL)
    assert config.unmaskable_token_ids == (0, 1, 2, 3, 4, 5)
