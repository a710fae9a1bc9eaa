"""What the model's methods return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class ImageFeatures(ModelOutput):
    """Features of whole images, no patch dropped.

    Attributes:
        last_hidden_state: (B, 1 + P, D), [CLS] first.
        pooler_output: (B, D), the mean of the patches or [CLS], as `config.pooling` says.
        embeds: (B, projection_size), L2-normalised; None without global alignment.
        local_embeds: (B, P, projection_size) of the patches; None without local alignment.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    embeds: Tensor | None = None
    local_embeds: Tensor | None = None


@dataclass
class TextFeatures(ModelOutput):
    """Features of whole reports, no word masked, nothing of any image in them.

    Attributes:
        last_hidden_state: (B, T, Dt), zero in the padding.
        pooler_output: (B, Dt), [CLS] or the mean of the tokens, as `config.text_pooling` says.
        embeds: (B, projection_size), L2-normalised; None without global alignment.
        local_embeds: (B, T, projection_size); None without local alignment.
        local_mask: (B, T) bool, True for the tokens that are aligned; None likewise.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    embeds: Tensor | None = None
    local_embeds: Tensor | None = None
    local_mask: Tensor | None = None


@dataclass
class FusedFeatures(ModelOutput):
    """Features of whole reports that have read their whole images.

    Attributes:
        last_hidden_state: (B, T, D), zero in the padding; (B, T, Dt) with fusion "gap_add".
        pooler_output: (B, D), or (B, Dt), [CLS] or the mean of the tokens likewise.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None


@dataclass
class MpmaForPreTrainingOutput(ModelOutput):
    """The loss of a step and its parts; a part that is switched off is None.

    Attributes:
        loss: the sum of the parts, each times its weight. The mean over ranks is the loss of the
            global batch, for each part too.
        loss_image, loss_report, loss_global, loss_local: the parts, unweighted and detached.
        image_loss_per_sample, report_loss_per_sample: (B,), detached; 0 for a report with nothing
            to predict.
        memory_used_share: share of the memory's slots that a sample of the states reads.
        memory_perplexity: how many slots share the attention, as exp of its entropy.
        logit_scale: inverse temperature of the global alignment.
    """

    loss: Tensor | None = None
    loss_image: Tensor | None = None
    loss_report: Tensor | None = None
    loss_global: Tensor | None = None
    loss_local: Tensor | None = None
    image_loss_per_sample: Tensor | None = None
    report_loss_per_sample: Tensor | None = None
    memory_used_share: Tensor | None = None
    memory_perplexity: Tensor | None = None
    logit_scale: Tensor | None = None
