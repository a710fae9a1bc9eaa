"""MPMA: two encoders, their fusion and their alignment; and its pretraining on masked pairs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from mpma_ext.integrations import transformers as attention
from mpma_train.models import alignment as gla
from mpma_train.models.alignment import GlobalLocalAlignment, ProjectionHead
from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.distributed import global_counts
from mpma_train.models.fusion import (
    CrossAttention,
    CrossModalFusion,
    GapAddFusion,
    MemoryUse,
    SharedMemory,
)
from mpma_train.models.image_encoder import (
    build_image_encoder,
    fixed_positions,
    two_resolutions,
)
from mpma_train.models.layers import GainLinear
from mpma_train.models.masking import PairedMasks, draw_masks
from mpma_train.models.outputs import (
    FusedFeatures,
    ImageFeatures,
    MpmaForPreTrainingOutput,
    TextFeatures,
)
from mpma_train.models.packing import PackedText, pack_text
from mpma_train.models.reconstruction import (
    ImageDecoder,
    ReportHead,
    image_losses,
    patch_targets,
    token_losses,
)
from mpma_train.models.text_encoder import TextEncoder

attention.register()

# Sines and cosines: parameters that are saved but never learned.
_FIXED = ("image_encoder.embeddings.position_embeddings", "image_decoder.positions")


class MpmaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial values."""

    config: MpmaConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("ViTMAELayer", "BertLayer", "FusionBlock")

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', which makes every parameter trainable: positions are fixed again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, parameter in model.named_parameters():
            if name.endswith(_FIXED):
                parameter.requires_grad_(False)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # For classes from outside of transformers, this sees only modules with parameters of their
        # own: a container cannot set its children's values here.
        if isinstance(module, GainLinear):
            init.normal_(module.weight, std=module.gain * module.in_features**-0.5)
        elif isinstance(module, SharedMemory):
            init.normal_(module.memory, std=self.config.initializer_range)
        elif isinstance(module, CrossAttention) and module.slots:
            head_width = module.slot_key.shape[1] // module.heads
            init.normal_(module.slot_key, std=head_width**-0.5)
            init.normal_(module.slot_value, std=module.slots**-0.5)
        elif isinstance(module, GlobalLocalAlignment) and module.image_global is not None:
            scale = gla.initial_logit_scale(self.config.temperature_init)
            init.constant_(module.logit_scale, scale)
        elif isinstance(module, ImageDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            count, width = module.positions.shape
            init.copy_(module.positions, fixed_positions(math.isqrt(count - 1), width))
        elif isinstance(module, ReportHead):
            init.zeros_(module.bias)


class MpmaModel(MpmaPreTrainedModel):
    """Both encoders, the fusion and the alignment heads. It masks nothing, in any mode."""

    def __init__(self, config: MpmaConfig):
        super().__init__(config)
        self.image_encoder = build_image_encoder(config)
        self.text_encoder = TextEncoder(config)
        gap_add = config.fusion == "gap_add"
        self.fusion = GapAddFusion(config) if gap_add else CrossModalFusion(config)
        self.alignment = GlobalLocalAlignment(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.text_encoder.bert.get_input_embeddings()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> FusedFeatures:
        """As `get_fused_features`."""
        return self.get_fused_features(pixel_values, input_ids, attention_mask)

    def get_image_features(self, pixel_values: Tensor) -> ImageFeatures:
        """Features of whole images.

        Args:
            pixel_values: (B, C, S, S) floating, normalised; S = image_size · target_scale (averaged
                down to image_size) or image_size.

        Raises:
            ValueError: another shape or dtype.
        """
        image, _ = two_resolutions(pixel_values, self.config)
        return self.image_features(self.image_encoder(image))

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
    ) -> TextFeatures:
        """Features of whole reports.

        Args:
            input_ids: (B, T) int64, right padded.
            attention_mask: (B, T), 1 = real; without it every token but padding is.
            word_ids: (B, T) int64, -1 for what is not aligned; without it every token that is not
                special is.

        Raises:
            ValueError: shapes or dtypes that do not fit, padding on the left, an unknown id.
        """
        attention_mask, word_ids = self.complete_text(input_ids, attention_mask, word_ids)
        text = pack_text(input_ids, attention_mask, self.config.vocab_size)
        (states,) = self.text_encoder(text, [text.pack(input_ids)])
        return self.text_features(text, states, word_ids)

    def get_fused_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> FusedFeatures:
        """Features of whole reports that have read their whole images.

        Args:
            pixel_values: as in `get_image_features`.
            input_ids, attention_mask: as in `get_text_features`, one report an image.

        Raises:
            ValueError: as there, or batches of different sizes.
        """
        attention_mask, _ = self.complete_text(input_ids, attention_mask, None)
        check_pairs(pixel_values, input_ids)
        image, _ = two_resolutions(pixel_values, self.config)
        text = pack_text(input_ids, attention_mask, self.config.vocab_size)
        states = self.image_encoder(image)
        _, fused, _ = self.encode_reports(text, None, text.pack(input_ids), states)
        fused = text.unpack(fused)
        return FusedFeatures(fused, self.pool_text(text, fused))

    def image_features(self, states: Tensor) -> ImageFeatures:
        """Pooled and projected encoder states (B, 1 + P, D), of all patches or of visible ones."""
        heads = self.alignment
        pooled = states[:, 0] if self.config.pooling == "cls" else states[:, 1:].mean(dim=1)
        return ImageFeatures(
            last_hidden_state=states,
            pooler_output=pooled,
            embeds=_direction(heads.image_global, pooled),
            local_embeds=heads.image_local and heads.image_local(states[:, 1:]),
        )

    def text_features(self, text: PackedText, states: Tensor, word_ids: Tensor) -> TextFeatures:
        """Pooled and projected states (N, Dt) of packed whole reports."""
        heads = self.alignment
        unpacked = text.unpack(states)
        pooled = self.pool_text(text, unpacked)
        local = heads.text_local is not None
        return TextFeatures(
            last_hidden_state=unpacked,
            pooler_output=pooled,
            embeds=_direction(heads.text_global, pooled),
            local_embeds=text.unpack(heads.text_local(states)) if local else None,
            local_mask=word_ids >= 0 if local else None,
        )

    def pool_text(self, text: PackedText, states: Tensor) -> Tensor:
        """What stands for a whole report: states (B, T, D), zero in the padding, to (B, D)."""
        if self.config.text_pooling == "cls":
            return states[:, 0]
        return states.sum(dim=1) / text.cu_seqlens.diff().unsqueeze(1)

    def encode_reports(
        self, text: PackedText, whole: Tensor | None, masked: Tensor | None, image_states: Tensor
    ) -> tuple[Tensor | None, Tensor | None, MemoryUse | None]:
        """Encode whole and masked reports in one packed call, and fuse the masked ones.

        Args:
            text: where the tokens lie.
            whole, masked: token ids (N,) of each copy, or None where it is not wanted.
            image_states: (B, 1 + Pv, D), which the masked copy alone reads.

        Returns:
            The whole copy's states (N, Dt), the masked one's fused states (N, D) ((N, Dt) with
            "gap_add"), and the use of the memory, where there are any.
        """
        copies = [copy for copy in (whole, masked) if copy is not None]
        patches, use = image_states[:, 1:], None
        gap_add = self.config.fusion == "gap_add"
        shift = self.fusion(patches) if gap_add and masked is not None else None
        states = self.text_encoder(text, copies, shift) if copies else []
        fused = states.pop() if masked is not None else None
        if fused is not None and not gap_add:
            fused, use = self.fusion(fused, patches, text.cu_seqlens, text.length)
        return states[0] if whole is not None else None, fused, use

    def complete_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, word_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Check a batch of reports, and fill in what was not given.

        Returns:
            attention_mask, and word_ids with -1 for special tokens and padding, both (B, T).
        """
        config = self.config
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
            found = f"{tuple(input_ids.shape)} of {input_ids.dtype}"
            raise ValueError(f"input_ids must be (B, T) of torch.int64, got {found}")
        if not 1 <= input_ids.shape[1] <= config.max_position_embeddings:
            raise ValueError(
                f"input_ids must have 1 to max_position_embeddings {config.max_position_embeddings}"
                f" tokens a report, got {input_ids.shape[1]}"
            )
        if attention_mask is None:
            attention_mask = (input_ids != config.pad_token_id).to(torch.int64)
        length = input_ids.shape[1]
        numbers = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        given = {"attention_mask": attention_mask, "word_ids": word_ids}
        for name, tensor in given.items():
            if tensor is not None and tensor.shape != input_ids.shape:
                shape, expected = tuple(tensor.shape), tuple(input_ids.shape)
                raise ValueError(f"{name} must have the shape of input_ids {expected}, got {shape}")
        special = input_ids.new_tensor(config.unmaskable_token_ids)
        free = attention_mask.bool() & ~torch.isin(input_ids, special)
        return attention_mask, torch.where(free, numbers if word_ids is None else word_ids, -1)


class MpmaForPreTraining(MpmaPreTrainedModel):
    """MPMA with its two reconstructions. Its `forward` is the only place where anything is masked.

    It trains under any loop: `forward` returns the loss and its parts.
    """

    def __init__(self, config: MpmaConfig):
        super().__init__(config)
        self.model = MpmaModel(config)
        self.image_decoder = ImageDecoder(config) if config.image_active else None
        self.report_head = ReportHead(config) if config.report_active else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.model.get_input_embeddings()

    def get_image_features(self, pixel_values: Tensor) -> ImageFeatures:
        """See `MpmaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
    ) -> TextFeatures:
        """See `MpmaModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask, word_ids)

    def get_fused_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> FusedFeatures:
        """See `MpmaModel.get_fused_features`."""
        return self.model.get_fused_features(pixel_values, input_ids, attention_mask)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        mask_seed: Tensor | None = None,
        report_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MpmaForPreTrainingOutput | tuple:
        """The losses of a batch of pairs, both of a pair masked in the same step.

        Under torch.distributed every rank must call it, with batches of one size: the alignment
        sees the global batch, and the mean over ranks of each loss is that of the global batch.

        Args:
            pixel_values: (B, C, S, S) floating, normalised; S = image_size · target_scale, the
                image to reconstruct, which the encoder sees averaged down to image_size; or
                image_size, enlarged bilinearly for the target.
            input_ids: (B, T) int64, right padded.
            attention_mask: (B, T), 1 = real; without it every token but padding is.
            word_ids: (B, T) int64, the number of the word a token belongs to, -1 for what is never
                masked nor aligned; without it every token that is not special is a word.
            mask_seed: (B,) int64, decides both masks of a pair; without it seeds are drawn from
                the default generator of the device.
            report_ids: (B,) int64, equal numbers = identical reports, which count as positives of
                each other; without it, reports with the same token ids do.
            return_dict: False for a tuple of what is not None.

        Raises:
            ValueError: shapes or dtypes that do not fit, padding on the left, an unknown id, ranks
                with batches of different sizes.
        """
        config, model = self.config, self.model
        attention_mask, word_ids = model.complete_text(input_ids, attention_mask, word_ids)
        check_pairs(pixel_values, input_ids, mask_seed=mask_seed, report_ids=report_ids)
        image, target_image = two_resolutions(pixel_values, config)
        text = pack_text(input_ids, attention_mask, config.vocab_size)
        masks = draw_masks(
            word_ids,
            config.num_patches,
            config.num_masked_patches,
            config.text_mask_ratio,
            mask_seed,
        )

        states = model.image_encoder(image, masks.visible_patches)
        aligned = config.global_active or config.local_active
        masked_ids = input_ids.masked_fill(masks.masked_tokens, config.mask_token_id)
        whole_states, fused_states, use = model.encode_reports(
            text,
            text.pack(input_ids) if aligned else None,
            text.pack(masked_ids) if config.report_active else None,
            states,
        )
        predicted = masks.masked_tokens if config.mlm_loss_on == "masked" else attention_mask.bool()
        longest, predicted_count = global_counts(*input_ids.shape, predicted.sum())
        parts: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        if config.image_active:
            losses = self._image_losses(states, target_image, masks)
            parts["image"], extra["image_loss_per_sample"] = losses.mean(), losses.detach()
        if config.report_active:
            report, place = predicted.nonzero(as_tuple=True)
            rows = text.cu_seqlens[report] + place
            losses = self._report_losses(fused_states, rows, input_ids[report, place])
            parts["report"] = losses.sum() / predicted_count.clamp(min=1)
            total = losses.detach().new_zeros(len(input_ids)).index_add(0, report, losses.detach())
            extra["report_loss_per_sample"] = total / predicted.sum(dim=1).clamp(min=1)
        if aligned:
            seen = model.image_encoder(image) if config.alignment_view == "full" else states
            whole = model.text_features(text, whole_states, word_ids)
            ids = gla.report_identities(config, input_ids, attention_mask, report_ids)
            parts |= self._alignment_losses(model.image_features(seen), whole, ids, longest)
        if config.global_active:
            extra["logit_scale"] = model.alignment.temperature_scale().detach()
        if use is not None:
            extra |= {"memory_used_share": use.used_share, "memory_perplexity": use.perplexity}

        weighted = [getattr(config, f"{name}_loss_weight") * part for name, part in parts.items()]
        output = MpmaForPreTrainingOutput(
            loss=sum(weighted),
            **{f"loss_{name}": part.detach() for name, part in parts.items()},
            **extra,
        )
        return output if return_dict or return_dict is None else output.to_tuple()

    def _image_losses(self, states: Tensor, target: Tensor, masks: PairedMasks) -> Tensor:
        """Reconstruction losses of the images: (B,)."""
        config = self.config
        predicted = self.image_decoder(states, masks.visible_patches, masks.masked_patches)
        side = config.patch_size * config.target_scale
        return image_losses(predicted, patch_targets(target, side, masks.masked_patches))

    def _report_losses(self, states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies (M,) of the rows (M,) of packed states (N, D) that have a target (M,)."""
        embeddings = self.get_input_embeddings().weight
        return token_losses(self.report_head(states.index_select(0, rows), embeddings), targets)

    def _alignment_losses(
        self, image: ImageFeatures, text: TextFeatures, report_ids: Tensor, longest: int
    ) -> dict[str, Tensor]:
        losses = {}
        if self.config.global_active:
            losses["global"] = self.model.alignment.global_loss(
                image.embeds, text.embeds, report_ids
            )
        if self.config.local_active:
            losses["local"] = gla.local_loss(
                self.config,
                text.local_embeds,
                image.local_embeds,
                text.local_mask,
                report_ids,
                longest,
            )
        return losses


def check_pairs(pixel_values: Tensor, input_ids: Tensor, **per_pair: Tensor | None) -> None:
    """One report an image, and one int64 number a pair in whatever else is given."""
    batch = len(input_ids)
    if len(pixel_values) != batch:
        raise ValueError(
            f"pixel_values and input_ids must hold one report an image, got {len(pixel_values)} "
            f"images and {batch} reports"
        )
    for name, numbers in per_pair.items():
        if numbers is not None and (numbers.shape != (batch,) or numbers.dtype != torch.int64):
            found = f"{tuple(numbers.shape)} of {numbers.dtype}"
            raise ValueError(f"{name} must be ({batch},) of torch.int64, got {found}")


def _direction(head: ProjectionHead | None, pooled: Tensor) -> Tensor | None:
    return None if head is None else F.normalize(head(pooled), dim=-1)
