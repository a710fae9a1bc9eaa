"""Parameters by what the optimiser does with them, and counted by part of the model.

`mpma env --parameters CONFIG` prints the table.
"""

from typing import Any

import torch
from torch import nn

from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.modeling_mpma import MpmaForPreTraining

# Learned vectors that are inputs, not maps: pulling them to zero only takes them away.
_NEVER_DECAYED = ("memory", "cls_token", "mask_token", "slot_key", "slot_value", "pos_embed")

_PARTS = {
    "image encoder": "model.image_encoder.",
    "text encoder": "model.text_encoder.",
    "fusion": "model.fusion.",
    "alignment heads": "model.alignment.",
    "image decoder": "image_decoder.",
    "report head": "report_head.",
}


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that are not decayed.

    They are biases, norms, the temperature, the memory, the learned slots, [CLS] and the mask
    token.
    """
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or name.rpartition(".")[2] in _NEVER_DECAYED
    }


def get_parameter_groups(
    model: nn.Module, weight_decay: float, text_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser, of the parameters that are trained.

    Args:
        model: an `MpmaForPreTraining` or `MpmaModel`, wrapped or not.
        weight_decay: for the matrices; see `no_weight_decay` for the rest.
        text_learning_rate: of the text encoder, where it differs from the optimiser's own.
    """
    exempt = no_weight_decay(model)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own_rate = text_learning_rate is not None and "text_encoder." in name
        key = (own_rate, name in exempt)
        if key not in groups:
            decay = 0.0 if name in exempt else weight_decay
            rate = {"lr": text_learning_rate} if own_rate else {}
            groups[key] = {"params": [], "weight_decay": decay, **rate}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def parameter_table(config: MpmaConfig) -> list[tuple[str, int]]:
    """Numbers of parameters, fixed positions included, by part and in "total".

    Nothing is allocated.
    """
    with torch.device("meta"):
        model = MpmaForPreTraining(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rows = [
        (part, sum(size for name, size in sizes.items() if name.startswith(prefix)))
        for part, prefix in _PARTS.items()
    ]
    return [*rows, ("total", sum(sizes.values()))]


def format_table(rows: list[tuple[str, int]]) -> str:
    """The table as text, a line a part, numbers in columns."""
    return "\n".join(f"{part:<16}{count:>14,}" for part, count in rows)
