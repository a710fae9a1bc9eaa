"""`attn_implementation="mpma"` for the bidirectional encoders of transformers.

transformers offers two plug points, and `register` fills both: `AttentionInterface` for the
attention itself and `AttentionMaskInterface` for the mask that a model builds once and hands to
every layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import mpma_ext

NAME = "mpma"

# Keywords with which transformers models change what attention computes: leaving one unheeded
# would give wrong numbers.
_UNSERVED = (
    "position_bias",
    "sliding_window",
    "softcap",
    "s_aux",
    "head_mask",
    "block_mask",
    "output_attentions",
)


def register() -> None:
    """Make `attn_implementation="mpma"` known to transformers. Calling it again changes nothing.

    It serves self- and cross-attention of encoders in two forms:

    - padded: the usual `attention_mask` (B, Sk), 1 = attend;
    - packed: sequences laid end to end as one row, `input_ids` (1, total) with `position_ids` that
      start anew at each sequence, no `attention_mask`, and the keywords that transformers' flash
      attention takes: `cu_seq_lens_q` int32 (B+1,) and `max_length_q` int, with `cu_seq_lens_k` and
      `max_length_k` where the keys are not the queries' own sequence.

    A model that asks for anything else (causal, grouped-query, a mask that is not key padding,
    attention weights as an output) gets a ValueError in its forward that names it.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, key_padding_mask)


def key_padding_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = True,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a whole forward: bool (B, Sk), True = attend, or None where none was given.

    Called by transformers' `create_*_mask`, whose keywords it takes. Its values are never looked
    at, not even to drop a mask that masks nothing: that would wait for the device.

    Raises:
        ValueError: the model wants another pattern than key padding, or a mask of another shape.
    """
    if not _uses_interface(type(config)):
        raise ValueError(
            f'attn_implementation="{NAME}": {_model_name(config)} computes attention by itself, '
            "outside AttentionInterface"
        )
    if mask_function is not bidirectional_mask_function:
        raise ValueError(_refusal(_model_name(config), _asked(mask_function, config, kwargs)))
    if attention_mask is None:
        # Some models append to the mask before they use it, and then ask that there be one.
        if allow_is_bidirectional_skip:
            return None
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask.shape != (batch_size, kv_length):
        shape = tuple(attention_mask.shape)
        raise ValueError(
            _refusal(_model_name(config), [f"an attention_mask of shape {shape}"])
            + f"; expected key padding ({batch_size}, {kv_length})"
        )
    return attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as `AttentionInterface` calls it.

    query (B, H, Sq, D), key and value (B, H, Sk, D), attention_mask as `key_padding_mask` gives it.
    Returns ((B, Sq, H, D), None): weights are never formed.

    Raises:
        ValueError: names the module and what it asked for that is not served.
    """
    asked = []
    # A module that says nothing counts as causal, as it does for transformers' own SDPA function.
    if is_causal if is_causal is not None else getattr(module, "is_causal", True):
        asked.append("causal attention")
    if key.shape[1] != query.shape[1]:
        heads = f"{query.shape[1]} query heads on {key.shape[1]} key heads"
        asked.append(f"grouped-query attention ({heads})")
    if attention_mask is not None and attention_mask.ndim != 2:
        asked.append(f"an arbitrary attention_mask of shape {tuple(attention_mask.shape)}")
    asked += [n for n in _UNSERVED if kwargs.get(n) is not None and kwargs[n] is not False]
    if asked:
        raise ValueError(_refusal(type(module).__name__, asked))

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if cu_seq_lens_q is None:
        output = mpma_ext.masked_attention(
            query, key, value, key_padding_mask=attention_mask, scale=scaling, dropout_p=dropout
        )
        return output, None

    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__}: with cu_seq_lens_q the sequences lie end to end in one row "
            f"and attention_mask is None; got {query.shape[0]} rows and "
            f"{'no' if attention_mask is None else 'an'} attention_mask"
        )
    if cu_seq_lens_k is None and query.shape[1] == key.shape[1]:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    if cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        raise ValueError(
            f"{type(module).__name__}: packed sequences need cu_seq_lens_q and max_length_q, and "
            "cu_seq_lens_k and max_length_k too where the keys are not the queries' own sequence"
        )
    output = mpma_ext.masked_attention_varlen(
        query[0],
        key[0],
        value[0],
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        max_length_q,
        max_length_k,
        scale=scaling,
        dropout_p=dropout,
    )
    return output[None], None


# Its lookups cannot be traced, and its answer never changes.
@torch.compiler.assume_constant_result
def _uses_interface(config_class: type) -> bool:
    """Whether the model of a configuration calls the registered attention function at all.

    transformers takes any attn_implementation for a model that does not, and would go on with our
    mask where the model expects one to add to its scores.
    """
    models = MODEL_MAPPING.get(config_class, ())
    models = models if isinstance(models, tuple) else (models,)
    return all(m._can_set_attn_implementation() for m in models)


def _model_name(config: PreTrainedConfig | None) -> str:
    if config is None:
        return "this model"
    return (config.architectures or [type(config).__name__])[0]


def _asked(mask_function: Callable[..., Any], config: Any, kwargs: dict[str, Any]) -> list[str]:
    """What a model wanted, as far as its mask function and its config tell."""
    if mask_function is causal_mask_function or getattr(config, "is_decoder", False):
        asked = ["a causal mask"]
    elif kwargs.get("local_size") is not None:
        asked = [f"a sliding-window mask of size {kwargs['local_size']}"]
    else:
        asked = [f"an arbitrary mask ({mask_function.__qualname__})"]
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if groups != heads:
        asked.append(f"grouped-query attention ({heads} query heads on {groups} key heads)")
    return asked


def _refusal(who: str, asked: list[str]) -> str:
    return (
        f'attn_implementation="{NAME}" serves bidirectional attention with a key padding mask '
        f"(True = attend); {who} asked for {', '.join(asked)}"
    )
