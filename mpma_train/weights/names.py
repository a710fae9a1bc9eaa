"""The names that other projects give to the parameters of the same encoders.

Ours are those of transformers' ViTMAEModel (or ViTModel) and BertModel in their present form.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_IMAGE_RULES = [
    # facebookresearch/mae and timm
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"layers.\1.mlp."),
    (r"^norm\.", "layernorm."),
    # transformers before it renamed its vision transformers; it still writes these to disk
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.", r"layers.\1.attention.q_proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.key\.", r"layers.\1.attention.k_proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.value\.", r"layers.\1.attention.v_proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.(layernorm_\w+)\.", r"layers.\1.\2."),
]
# The TensorFlow release of BERT called a LayerNorm's weight and bias so, and its ports kept it.
_TEXT_RULES = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]

_FUSED = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")
_IMAGE_ROOTS = ("embeddings.cls_token", "cls_token")
_TEXT_ROOTS = ("embeddings.word_embeddings.weight",)


@dataclass
class Named:
    """A tensor under our name, with the name it had."""

    source: str
    tensor: Tensor


def image_names(tensors: dict[str, Tensor]) -> dict[str, Named]:
    """A vision transformer's tensors under our names, whatever prefix they stand behind.

    Args:
        tensors: by the names of facebookresearch/mae, timm, or transformers (old or new). A fused
            (3D, D) query-key-value weight is split.

    Returns:
        What could be named, and under their own names the tensors beside it behind that prefix.
        Empty where there is no class token, so no vision transformer.
    """
    return _best(tensors, _IMAGE_ROOTS, _IMAGE_RULES)


def text_names(tensors: dict[str, Tensor]) -> dict[str, Named]:
    """BERT's tensors under our names, whatever prefix they stand behind; empty where none is."""
    return _best(tensors, _TEXT_ROOTS, _TEXT_RULES)


def _best(
    tensors: dict[str, Tensor], roots: tuple[str, ...], rules: list[tuple[str, str]]
) -> dict[str, Named]:
    prefixes = {
        next(name[: -len(root)] for root in roots if name.endswith(root))
        for name in tensors
        if any(name == root or name.endswith(f".{root}") for root in roots)
    }
    named = [_rename(tensors, prefix, rules) for prefix in sorted(prefixes)]
    return max(named, key=len, default={})


def _rename(
    tensors: dict[str, Tensor], prefix: str, rules: list[tuple[str, str]]
) -> dict[str, Named]:
    named = {}
    for source, tensor in tensors.items():
        if not source.startswith(prefix):
            continue
        name = source.removeprefix(prefix)
        if fused := _FUSED.match(name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                ours = f"layers.{fused[1]}.attention.{letter}_proj.{fused[2]}"
                named[ours] = Named(source, part)
            continue
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        named[name] = Named(source, tensor)
    return named


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our image encoder's state under timm's names, query, key and value fused."""
    renamed = {}
    for name, tensor in state.items():
        if match := re.match(r"^(layers\.\d+\.attention\.)q_proj\.(weight|bias)$", name):
            parts = [state[f"{match[1]}{letter}_proj.{match[2]}"] for letter in "qkv"]
            number = match[1].split(".")[1]
            renamed[f"blocks.{number}.attn.qkv.{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            renamed[_timm_name(name)] = tensor
    return renamed


_TIMM_RULES = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"^layers\.", "blocks."),
    (r"^layernorm\.", "norm."),
]


def _timm_name(name: str) -> str:
    for pattern, theirs in _TIMM_RULES:
        name = re.sub(pattern, theirs, name)
    return name
