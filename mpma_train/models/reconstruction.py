"""Reconstruction: masked patches from the image alone, masked words from the fused states."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer

from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.image_encoder import take_rows
from mpma_train.models.layers import full_precision

_VARIANCE_EPS = 1e-6


class ImageDecoder(nn.Module):
    """The light decoder of MAE (He et al., CVPR 2022), predicting at target_scale times the size.

    The target at twice the input's resolution is MRM's (Zhou et al., ICLR 2023).
    """

    def __init__(self, config: MpmaConfig):
        super().__init__()
        decoder = config.decoder_config()
        width = decoder.hidden_size
        side = config.image_size // config.patch_size
        pixels = config.num_channels * (config.patch_size * config.target_scale) ** 2
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + side * side, width), requires_grad=False)
        self.layers = nn.ModuleList(
            [ViTMAELayer(decoder) for _ in range(decoder.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output = nn.Linear(width, pixels)

    def forward(self, states: Tensor, visible_patches: Tensor, masked_patches: Tensor) -> Tensor:
        """Pixels of the masked patches.

        Args:
            states: (B, 1 + Pv, D) of [CLS] and the visible patches.
            visible_patches: (B, Pv) and masked_patches (B, Pm), patch numbers.

        Returns:
            (B, Pm, q), q = (patch_size · target_scale)² · num_channels.
        """
        states = self.embed(states)
        batch, _, width = states.shape
        patches = self.mask_token.to(states.dtype).expand(batch, len(self.positions) - 1, -1)
        place = visible_patches.unsqueeze(-1).expand(-1, -1, width)
        patches = patches.scatter(1, place, states[:, 1:])
        states = torch.cat([states[:, :1], patches], dim=1) + self.positions
        for layer in self.layers:
            states = layer(states)
        return self.output(self.norm(take_rows(states[:, 1:], masked_patches)))


class ReportHead(nn.Module):
    """BERT's masked-word head, Linear-GELU-LayerNorm-Linear; the last is the word embedding's.

    Works on rows (N, D): only those with a target are ever given to it.
    """

    def __init__(self, config: MpmaConfig):
        super().__init__()
        width = config.hidden_size if config.fusion != "gap_add" else config.text_hidden_size
        self.transform = nn.Linear(width, config.text_hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.text_hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """States (N, D) and word_embeddings (V, Dt) to logits (N, V)."""
        states = self.norm(self.activation(self.transform(states)))
        return F.linear(states, word_embeddings, self.bias)


@torch.no_grad()
def patch_targets(image: Tensor, patch_size: int, masked_patches: Tensor) -> Tensor:
    """What is to be predicted: the pixels of the masked patches, normalised patch by patch.

    Args:
        image: (B, C, S, S), of which patch_size is the patch.
        patch_size: side of a patch in this image.
        masked_patches: (B, Pm).

    Returns:
        (B, Pm, patch_size² · C), each patch with mean 0 and (unbiased) variance 1, eps 1e-6, as in
        MAE; float32 or better.
    """
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    pixels = full_precision(take_rows(patches, masked_patches))
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) / (variance + _VARIANCE_EPS).sqrt()


def image_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image over its masked patches: (B, Pm, q) twice to (B,)."""
    return (predicted.to(target.dtype) - target).square().mean(dim=-1).mean(dim=-1)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row: logits (N, V) and targets (N,) int64 to (N,)."""
    return F.cross_entropy(full_precision(logits), targets, reduction="none")
