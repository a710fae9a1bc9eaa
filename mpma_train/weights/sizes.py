"""The MPMA settings that a checkpoint decides, read from its shapes and its config.json."""

import math
from typing import Any

from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.weights.files import Checkpoint
from mpma_train.weights.names import Named

# Adapted where they differ: positions recomputed or cut, words added, channels folded.
_ADAPTED = {"image_size", "num_channels", "max_position_embeddings", "vocab_size"}


def image_settings(checkpoint: Checkpoint, named: dict[str, Named]) -> dict[str, Any]:
    """Settings of the image encoder that the checkpoint decides.

    Raises:
        ValueError: a tensor without which there is no encoder is missing.
    """
    patch = _need(checkpoint, named, "embeddings.patch_embeddings.projection.weight")
    positions = _need(checkpoint, named, "embeddings.position_embeddings")
    hidden = _need(checkpoint, named, "layers.0.mlp.fc1.weight")
    return {
        "hidden_size": patch[0],
        "patch_size": patch[-1],
        "image_size": math.isqrt(positions[-2]) * patch[-1],
        "intermediate_size": hidden[0],
        "num_hidden_layers": _layers(named, "layers."),
    } | _from_config(checkpoint, "num_attention_heads", "layer_norm_eps", "hidden_act")


def text_settings(checkpoint: Checkpoint, named: dict[str, Named]) -> dict[str, Any]:
    """Settings of the text encoder that the checkpoint decides.

    Raises:
        ValueError: no BERT, or a tensor without which there is no encoder is missing.
    """
    words = _need(checkpoint, named, "embeddings.word_embeddings.weight")
    positions = _need(checkpoint, named, "embeddings.position_embeddings.weight")
    hidden = _need(checkpoint, named, "encoder.layer.0.intermediate.dense.weight")
    of_text = _from_config(checkpoint, "num_attention_heads", "layer_norm_eps")
    kind = checkpoint.config.get("model_type", "bert")
    # RoBERTa has the same names, but its positions start at 2 and its tokens are no word pieces.
    if "roberta" in kind or kind == "mpma":
        raise ValueError(f"{checkpoint.source}: expected a BERT, got {kind!r}")
    return {
        "vocab_size": words[0],
        "text_hidden_size": words[1],
        "max_position_embeddings": positions[0],
        "text_intermediate_size": hidden[0],
        "text_num_hidden_layers": _layers(named, "encoder.layer."),
        **_from_config(checkpoint, "hidden_act"),
        **{f"text_{name}": value for name, value in of_text.items()},
    }


def usual_heads(found: dict[str, Any]) -> dict[str, int]:
    """Heads 64 wide, as in every published ViT and BERT: they leave no trace in the shapes."""
    return {
        f"{prefix}num_attention_heads": max(found[f"{prefix}hidden_size"] // 64, 1)
        for prefix in ("", "text_")
        if f"{prefix}hidden_size" in found
    }


def check_named(found: dict[str, Any], config: MpmaConfig, checkpoint: Checkpoint) -> None:
    """The settings of a checkpoint against those of the model to fill.

    Raises:
        ValueError: one that cannot be adapted differs.
    """
    differing = [
        f"{name} is {getattr(config, name)}, the checkpoint's {value}"
        for name, value in found.items()
        if name not in _ADAPTED and getattr(config, name) != value
    ]
    if differing:
        raise ValueError(f"{checkpoint.source} does not fit the model: {'; '.join(differing)}")


def _need(checkpoint: Checkpoint, named: dict[str, Named], name: str) -> tuple[int, ...]:
    if name not in named:
        some = ", ".join(sorted(checkpoint.tensors)[:8])
        raise ValueError(
            f"{checkpoint.source}: found nothing for {name}; its tensors are called {some}, ..."
        )
    return tuple(named[name].tensor.shape)


def _layers(named: dict[str, Named], prefix: str) -> int:
    tails = (name.removeprefix(prefix) for name in named if name.startswith(prefix))
    return 1 + max(int(tail.split(".")[0]) for tail in tails)


def _from_config(checkpoint: Checkpoint, *names: str) -> dict[str, Any]:
    return {name: checkpoint.config[name] for name in names if name in checkpoint.config}
