"""GLA: alignment of image and report as wholes, and of patches and tokens.

Global: the symmetric InfoNCE of CLIP (Radford et al., ICML 2021). Local: GLoRIA's (Huang et al.,
ICCV 2021) or FILIP's (Yao et al., ICLR 2022) similarity, in the same cross-entropy. The paper's own
forms could not be read; which of these is used and how they are scaled is our choice.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpma_ext
from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.distributed import gather_rows, pad_length, world_size
from mpma_train.models.layers import GainLinear, full_precision

_MAX_LOGIT_SCALE = 100.0


class ProjectionHead(nn.Module):
    """Linear, GELU, LayerNorm, Linear: (..., D) to (..., projection_size) times `scale`."""

    def __init__(self, width: int, projection_size: int, eps: float, scale: float = 1.0):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.output = GainLinear(width, projection_size)
        self.scale = scale

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) to (..., projection_size)."""
        return self.output(self.norm(F.gelu(self.hidden(states)))) * self.scale


class GlobalLocalAlignment(nn.Module):
    """The four heads and the temperature; a part that is switched off is None."""

    def __init__(self, config: MpmaConfig):
        super().__init__()
        size, eps = config.projection_size, config.layer_norm_eps
        image, text = config.hidden_size, config.text_hidden_size
        self.image_global = self.text_global = self.image_local = self.text_local = None
        if config.global_active:
            self.image_global = ProjectionHead(image, size, eps)
            self.text_global = ProjectionHead(text, size, eps)
            self.logit_scale = nn.Parameter(torch.empty(1))  # FSDP takes no scalars
        if config.local_active:
            # Heads start with outputs of unit variance: with this factor ⟨w, v⟩ has it too.
            # Normalised vectors would give a flat softmax, unscaled ones a saturated one.
            scale = size**-0.25
            self.image_local = ProjectionHead(image, size, eps, scale)
            self.text_local = ProjectionHead(text, size, eps, scale)

    def temperature_scale(self) -> Tensor:
        """What cosines are multiplied by: at most 100, with the gradient of the unclamped scale.

        A plain clamp would have no gradient above its bound, and so never come back.
        """
        scale = self.logit_scale.exp().squeeze()
        return scale - (scale - _MAX_LOGIT_SCALE).clamp(min=0).detach()

    def global_loss(self, image_embeds: Tensor, text_embeds: Tensor, report_ids: Tensor) -> Tensor:
        """Symmetric InfoNCE of the global batch, this rank's rows.

        Args:
            image_embeds, text_embeds: (B, d), L2-normalised.
            report_ids: (B,) int64; equal numbers are positives of each other.
        """
        targets = _targets(report_ids)
        # A scale of up to 100 leaves too few digits of a bfloat16 product.
        with torch.autocast(image_embeds.device.type, enabled=False):
            image, text = full_precision(image_embeds), full_precision(text_embeds)
            scale = self.temperature_scale().to(image.dtype)
            image_rows = scale * image @ gather_rows(text).T
            text_rows = scale * text @ gather_rows(image).T
            return _symmetric(image_rows, text_rows, targets)


def local_loss(
    config: MpmaConfig,
    tokens: Tensor,
    patches: Tensor,
    token_mask: Tensor,
    report_ids: Tensor,
    longest: int,
) -> Tensor:
    """Symmetric cross-entropy of local similarities over the global batch, this rank's rows.

    Args:
        config: local_alignment, local_aggregation, local_scale and the two temperatures.
        tokens: (B, T, d) with token_mask (B, T) bool, True = aligned.
        patches: (B, P, d).
        report_ids: (B,) int64; equal numbers are positives of each other.
        longest: the longest T of all ranks.
    """
    targets = _targets(report_ids)
    if world_size() == 1:
        text_rows, image_rows = local_similarity(config, tokens, patches, token_mask)
    else:
        all_tokens = gather_rows(pad_length(tokens, longest))
        all_masks = gather_rows(pad_length(token_mask, longest))
        text_rows, _ = local_similarity(config, tokens, gather_rows(patches), token_mask)
        _, image_rows = local_similarity(config, all_tokens, patches, all_masks)
    scale = config.local_scale
    return _symmetric(scale * image_rows.T, scale * text_rows, targets)


def local_similarity(
    config: MpmaConfig, tokens: Tensor, patches: Tensor, token_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Similarity of every report with every image from tokens and patches.

    Args:
        config: local_alignment "softmax" or "max", local_aggregation and the two temperatures.
        tokens: (Bt, T, d) with token_mask (Bt, T) bool, True = aligned; `local_embeds` of a text.
        patches: (Bi, P, d); `local_embeds` of an image.

    Returns:
        Two (Bt, Bi): to rank images for a report, and to rank reports for an image. They are the
        same for "softmax"; for "max" each is FILIP's mean over its own side's vectors, which are
        L2-normalised as FILIP's are.
    """
    if config.local_alignment == "max":
        return mpma_ext.token_patch_max_similarity(
            F.normalize(tokens, dim=-1), F.normalize(patches, dim=-1), token_mask=token_mask
        )
    similarity = mpma_ext.token_patch_similarity(
        tokens,
        patches,
        token_mask=token_mask,
        attention_temperature=float(config.attention_temperature),
        pooling_temperature=float(config.pooling_temperature),
    )
    if config.local_aggregation == "mean":
        # The sum over tokens grows with their number: long reports would win by length alone.
        count = token_mask.sum(dim=1, keepdim=True).clamp(min=1)
        similarity = similarity - count.to(similarity.dtype).log()
    return similarity, similarity


def report_identities(
    config: MpmaConfig, input_ids: Tensor, attention_mask: Tensor, report_ids: Tensor | None
) -> Tensor:
    """Numbers (B,) int64 that are equal for pairs whose report is the other's positive too.

    With false_negatives "exact", `report_ids` where given, else a hash of the token ids; with
    "none" every pair has a number of its own.
    """
    batch, length = input_ids.shape
    if config.false_negatives == "none":
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        return torch.arange(batch, device=input_ids.device) + rank * batch
    if report_ids is not None:
        return report_ids
    # A polynomial in an odd base modulo 2**64, in which padding has no part.
    base = torch.full((length,), 0x5851F42D4C957F2D, device=input_ids.device)
    return ((input_ids + 1) * attention_mask.to(torch.int64) * base.cumprod(0)).sum(dim=1)


def initial_logit_scale(temperature: float) -> float:
    """The logarithm of the inverse temperature, which is what is learned."""
    return math.log(1 / temperature)


def _targets(report_ids: Tensor) -> Tensor:
    """For this rank's rows, the share of each positive among the global batch: (B, W·B)."""
    positives = report_ids.unsqueeze(1) == gather_rows(report_ids)
    return positives / positives.sum(dim=1, keepdim=True)


def _symmetric(image_rows: Tensor, text_rows: Tensor, targets: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies; rows are this rank's, columns the global batch."""
    targets = targets.to(image_rows.dtype)
    both = F.cross_entropy(image_rows, targets) + F.cross_entropy(text_rows, targets)
    return both / 2
