"""Every setting of the model, with its default, in one flat configuration."""

from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, PreTrainedConfig, ViTMAEConfig
from transformers.activations import ACT2FN

# What transformers itself hands to a configuration besides its fields, when it loads or copies one.
_TRANSFORMERS_KEYS = {
    "model_type",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "torch_dtype",
    "num_labels",
}


@strict
class MpmaConfig(PreTrainedConfig):
    """Settings of MPMA. The paper's own values could not be read: every default is our choice.

    Sizes follow ViT-B/16 (Dosovitskiy et al., ICLR 2021) and BERT-base (Devlin et al., NAACL 2019);
    masking and the target at twice the resolution follow MRM (Zhou et al., ICLR 2023); the memory
    follows R2GenCMN (Chen et al., ACL 2021) and, for `kv_concat`, the Meshed-Memory Transformer
    (Cornia et al., CVPR 2020); the local alignment follows GLoRIA (Huang et al., ICCV 2021) or
    FILIP (Yao et al., ICLR 2022).

    Image encoder:
        image_size: side in pixels of the image the encoder sees.
        patch_size: side of a patch; image_size is a multiple of it.
        num_channels: 1 for radiographs.
        target_scale: the image to reconstruct has target_scale times the encoder's resolution.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
            layer_norm_eps: as in ViT. hidden_size is also the width of the fusion.
        image_encoder: "vit", or "timm/<name>" for a vision transformer of timm by its name, whose
            sizes the settings above must state. It keeps its own activation and positions.
        pooling: what stands for the whole image, the "mean" of the patches or "cls".
    Text encoder:
        text_hidden_size, text_num_hidden_layers, text_num_attention_heads, text_intermediate_size,
            vocab_size, max_position_embeddings, text_dropout, text_layer_norm_eps: as in BERT.
        text_pooling: what stands for the whole report, "cls" or the "mean" of its tokens, [CLS] and
            [SEP] among them.
        text_initializer_range: deviation of BERT's initial weights; positions start with half of
            it. Small against 1 / sqrt(width), a state starts as its word and little else.
        pad_token_id, unk_token_id, cls_token_id, sep_token_id, mask_token_id: BERT's by default.
        special_token_ids: further tokens that are never masked nor aligned, such as `___`.
    Masking:
        image_mask_ratio: share of the patches that the encoder does not see.
        text_mask_ratio: share of the whole words that become [MASK].
    Fusion (MA-CMF):
        fusion: "memory" | "kv_concat" | "cross_attention" | "gap_add".
        fusion_layers: cross-attention blocks from the masked report to the visible patches.
        fusion_dropout: on the attention weights and the residual branches of the fusion.
        memory_slots, memory_topk: size of the memory, and how many slots one head reads; top-k of
            memory_slots or more reads them all.
        kv_concat_slots: learned keys and values a block has with "kv_concat".
    Alignment (GLA):
        global_alignment: whether whole images and reports are aligned.
        local_alignment: "softmax" (GLoRIA) | "max" (FILIP) | "none".
        local_aggregation: "mean" | "sum" over a report's tokens; for "softmax" only.
        alignment_view: "visible" patches, or all in a second, "full" pass.
        projection_size: width of the shared space.
        temperature_init: of the global alignment; learned as the logarithm of its inverse.
        local_scale: what local similarities are multiplied by before the cross-entropy.
        attention_temperature, pooling_temperature: of `mpma_ext.token_patch_similarity`.
        false_negatives: "exact" counts identical reports as positives of each other; or "none".
    Reconstruction:
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads,
            decoder_intermediate_size: of the image decoder.
        mlm_loss_on: "masked" tokens, or "all" real ones as in MRM (which counted padding too; text
            runs packed here, so padding has no state to predict from).
    Loss:
        image_loss_weight, report_loss_weight, global_loss_weight, local_loss_weight: a part of
            weight 0 is switched off: neither built nor computed.

    Initial values:
        initializer_range: deviation of all other weights that have no scale of their own.

    Raises:
        ValueError: names the setting that is unknown, of a wrong type or out of range.
    """

    model_type = "mpma"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 1
    target_scale: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_encoder: str = "vit"
    pooling: Literal["mean", "cls"] = "mean"

    text_hidden_size: int = 768
    text_num_hidden_layers: int = 12
    text_num_attention_heads: int = 12
    text_intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    text_pooling: Literal["cls", "mean"] = "cls"
    text_initializer_range: float | int = 0.02
    text_dropout: float | int = 0.1
    text_layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    unk_token_id: int = 100
    cls_token_id: int = 101
    sep_token_id: int = 102
    mask_token_id: int = 103
    special_token_ids: list[int] | tuple[int, ...] = ()

    image_mask_ratio: float | int = 0.75
    text_mask_ratio: float | int = 0.5

    fusion: Literal["memory", "kv_concat", "cross_attention", "gap_add"] = "memory"
    fusion_layers: int = 2
    fusion_dropout: float | int = 0.1
    memory_slots: int = 2048
    memory_topk: int = 32
    kv_concat_slots: int = 40

    global_alignment: bool = True
    local_alignment: Literal["softmax", "max", "none"] = "softmax"
    local_aggregation: Literal["mean", "sum"] = "mean"
    alignment_view: Literal["visible", "full"] = "visible"
    projection_size: int = 128
    temperature_init: float | int = 0.07
    local_scale: float | int = 10.0
    attention_temperature: float | int = 4.0
    pooling_temperature: float | int = 5.0
    false_negatives: Literal["exact", "none"] = "exact"

    decoder_hidden_size: int = 768
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 12
    decoder_intermediate_size: int = 3072
    mlm_loss_on: Literal["masked", "all"] = "masked"

    image_loss_weight: float | int = 1.0
    report_loss_weight: float | int = 1.0
    global_loss_weight: float | int = 1.0
    local_loss_weight: float | int = 1.0

    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - _TRANSFORMERS_KEYS)
        if unknown:
            known = ", ".join(sorted(type(self).setting_names()))
            raise ValueError(f"MpmaConfig: unknown settings {unknown}; expected some of {known}")
        super().__post_init__(**kwargs)
        self._check_ranges()
        self._check_shapes()

    @classmethod
    def setting_names(cls) -> set[str]:
        """Names of MPMA's own settings, without those of every transformers configuration."""
        return {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)}

    @property
    def num_patches(self) -> int:
        """P, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_masked_patches(self) -> int:
        """How many of the P patches the encoder does not see in pretraining."""
        return min(round(self.num_patches * self.image_mask_ratio), self.num_patches - 1)

    @property
    def target_size(self) -> int:
        """Side in pixels of the image to reconstruct."""
        return self.image_size * self.target_scale

    @property
    def local_active(self) -> bool:
        """Whether tokens and patches are aligned."""
        return self.local_alignment != "none" and self.local_loss_weight > 0

    @property
    def global_active(self) -> bool:
        """Whether images and reports are aligned as wholes."""
        return self.global_alignment and self.global_loss_weight > 0

    @property
    def image_active(self) -> bool:
        """Whether there are masked patches to reconstruct."""
        return self.image_loss_weight > 0 and self.num_masked_patches > 0

    @property
    def report_active(self) -> bool:
        """Whether there are words to reconstruct."""
        return self.report_loss_weight > 0 and (
            self.text_mask_ratio > 0 or self.mlm_loss_on == "all"
        )

    @property
    def unmaskable_token_ids(self) -> tuple[int, ...]:
        """Tokens that are never masked and never aligned."""
        own = (self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id)
        return tuple(sorted({*own, self.mask_token_id, *self.special_token_ids}))

    def vit_config(self) -> ViTMAEConfig:
        """The image encoder and its decoder in the words of transformers' ViT-MAE."""
        return ViTMAEConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.layer_norm_eps,
            initializer_range=self.initializer_range,
            attn_implementation="mpma",
        )

    def decoder_config(self) -> ViTMAEConfig:
        """The blocks of the image decoder."""
        config = self.vit_config()
        config.hidden_size = self.decoder_hidden_size
        config.num_hidden_layers = self.decoder_num_hidden_layers
        config.num_attention_heads = self.decoder_num_attention_heads
        config.intermediate_size = self.decoder_intermediate_size
        return config

    def bert_config(self) -> BertConfig:
        """The text encoder in the words of transformers' BERT."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.text_hidden_size,
            num_hidden_layers=self.text_num_hidden_layers,
            num_attention_heads=self.text_num_attention_heads,
            intermediate_size=self.text_intermediate_size,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.text_layer_norm_eps,
            hidden_dropout_prob=self.text_dropout,
            attention_probs_dropout_prob=self.text_dropout,
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            initializer_range=self.text_initializer_range,
            attn_implementation="mpma",
        )

    def _check_ranges(self) -> None:
        may_be_zero = {"num_hidden_layers", "text_num_hidden_layers", "decoder_num_hidden_layers"}
        may_be_zero |= {"fusion_layers"} | {n for n in self.setting_names() if n.endswith("_id")}
        for name in sorted(self.setting_names()):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name.endswith(("_dropout", "_mask_ratio")):
                _check(name, "in [0, 1)", value, 0 <= value < 1)
            elif name.endswith("_loss_weight"):
                _check(name, "0 or more", value, value >= 0)
            elif name in may_be_zero:
                _check(name, "0 or more", value, value >= 0)
            else:
                _check(name, "positive", value, value > 0)
        _check(
            "hidden_act", "one of " + ", ".join(ACT2FN), self.hidden_act, self.hidden_act in ACT2FN
        )
        for name in [n for n in self.setting_names() if n.endswith("_token_id")]:
            value = getattr(self, name)
            _check(name, f"below vocab_size {self.vocab_size}", value, value < self.vocab_size)
        inside = all(0 <= t < self.vocab_size for t in self.special_token_ids)
        expected = f"ids below vocab_size {self.vocab_size}"
        _check("special_token_ids", expected, self.special_token_ids, inside)

    def _check_shapes(self) -> None:
        whole = self.image_size % self.patch_size == 0
        expected = f"a multiple of patch_size {self.patch_size}"
        _check("image_size", expected, self.image_size, whole)
        for prefix in ("", "text_", "decoder_"):
            width, heads = (
                getattr(self, prefix + part) for part in ("hidden_size", "num_attention_heads")
            )
            expected = f"a multiple of {prefix}num_attention_heads {heads}"
            _check(f"{prefix}hidden_size", expected, width, width % heads == 0)
        for name in ("hidden_size", "decoder_hidden_size"):
            # Two sines and two cosines for each frequency of the fixed positions.
            _check(name, "a multiple of 4", getattr(self, name), getattr(self, name) % 4 == 0)
        known = self.image_encoder == "vit" or self.image_encoder.removeprefix("timm/") not in (
            "",
            self.image_encoder,
        )
        _check("image_encoder", '"vit" or "timm/<name>"', self.image_encoder, known)


def _check(name: str, expected: str, value: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"MpmaConfig: {name} must be {expected}, got {value!r}")


_strict_setattr = MpmaConfig.__setattr__


def _setattr(self: MpmaConfig, name: str, value: object) -> None:
    # The strict checks of types raise an error of their own, which is no ValueError.
    try:
        _strict_setattr(self, name, value)
    except StrictDataclassError as error:
        raise ValueError(f"MpmaConfig: {error}") from error


MpmaConfig.__setattr__ = _setattr
