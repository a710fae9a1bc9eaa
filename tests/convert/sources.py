"""Tiny encoders of other projects, and their checkpoints as those projects write them."""

import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# MPMA's other parts, as small as they go, for a `--config` file.
SMALL_TEXT = {
    "text_hidden_size": 32,
    "text_num_hidden_layers": 1,
    "text_num_attention_heads": 4,
    "text_intermediate_size": 32,
}
SMALL_MODEL = {
    "fusion_layers": 1,
    "memory_slots": 8,
    "memory_topk": 2,
    "projection_size": 8,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
WORDS = 120


def randomise(model, seed=0):
    """Random values everywhere, so that no bias, norm or position is what it starts as anyway."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


def vit_mae(channels=3, image_size=16, **changes):
    config = ViTMAEConfig(
        image_size=image_size,
        patch_size=4,
        num_channels=channels,
        mask_ratio=0.0,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        **(SMALL | {"layer_norm_eps": 1e-6} | changes),
    )
    torch.manual_seed(0)
    model = randomise(ViTMAEForPreTraining(config))
    model.vit.embeddings.position_embeddings.data = fixed_positions(
        image_size // 4, config.hidden_size
    )
    return model


def fixed_positions(side, width=32):
    """MAE's table, written out from its formula: columns first, then rows, sines before cosines."""
    table = torch.zeros(1 + side * side, width)
    for row in range(side):
        for column in range(side):
            for i in range(width // 4):
                rate = 10000 ** -(i / (width // 4))
                angles = torch.tensor([column * rate, row * rate])
                line = torch.stack([angles.sin(), angles.cos()], dim=1).flatten()
                table[1 + row * side + column, i :: width // 4] = line
    return table.unsqueeze(0)


def vit_mae_states(model, pixels):
    """States (B, 1 + P, D) of transformers' own encoder; its noise orders the patches."""
    patches = model.vit.embeddings.patch_embeddings.num_patches
    noise = torch.arange(patches).expand(len(pixels), -1).float()
    with torch.no_grad():
        return model.vit(pixels, noise=noise).last_hidden_state


def mae_state(model):
    """The names of facebookresearch/mae (and timm), from its published models_mae.py."""
    theirs = model.state_dict()
    state = {
        "cls_token": theirs["vit.embeddings.cls_token"],
        "pos_embed": theirs["vit.embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
    }
    for part in ("weight", "bias"):
        for i in range(model.config.num_hidden_layers):
            layer = f"vit.layers.{i}"
            state[f"blocks.{i}.norm1.{part}"] = theirs[f"{layer}.layernorm_before.{part}"]
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(
                [theirs[f"{layer}.attention.{letter}_proj.{part}"] for letter in "qkv"]
            )
            state[f"blocks.{i}.attn.proj.{part}"] = theirs[f"{layer}.attention.o_proj.{part}"]
            state[f"blocks.{i}.norm2.{part}"] = theirs[f"{layer}.layernorm_after.{part}"]
            state[f"blocks.{i}.mlp.fc1.{part}"] = theirs[f"{layer}.mlp.fc1.{part}"]
            state[f"blocks.{i}.mlp.fc2.{part}"] = theirs[f"{layer}.mlp.fc2.{part}"]
        state[f"norm.{part}"] = theirs[f"vit.layernorm.{part}"]
    return state


MAE_DECODER = {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.bias": torch.zeros(48)}


def bert_config(**changes):
    return BertConfig(vocab_size=WORDS, max_position_embeddings=24, **(SMALL | changes))


def bert(head=False, **changes):
    torch.manual_seed(0)
    model_class = BertForPreTraining if head else BertModel
    return randomise(model_class(bert_config(**changes)), seed=1)


def write_vocabulary(folder, words=WORDS):
    """A vocab.txt as BERT's: [PAD] first, [UNK] to [MASK] at 100 to 103."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    lines = [special.get(i, f"word{i}") for i in range(words)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
