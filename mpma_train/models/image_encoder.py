"""The image encoder: a vision transformer that can be shown some of the patches only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTMAEModel
from transformers import initialization as init
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEEmbeddings,
    build_2d_sinusoidal_position_embedding,
)

from mpma_train.models.configuration_mpma import MpmaConfig


class VitImageEncoder(ViTMAEModel):
    """transformers' ViT-MAE encoder (He et al., CVPR 2022), but masked only where a mask is given.

    ViTMAEModel drops patches in evaluation too; here every patch is seen unless the caller says
    which. Parameters keep ViTMAEModel's names, so that its checkpoints fit.
    """

    # What is sharded by itself: not the embeddings, whose own forward is never called here.
    _no_split_modules = ("ViTMAELayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers 5.17 skips these once the convolution inside has its values, which it always
        # has: a new ViTMAEModel would have no positions.
        if isinstance(module, ViTMAEEmbeddings):
            width = module.cls_token.shape[-1]
            side = module.image_size[0] // module.patch_size
            init.copy_(module.position_embeddings, fixed_positions(side, width).unsqueeze(0))
            init.normal_(module.cls_token, std=self.config.initializer_range)
            weight = module.patch_embeddings.projection.weight
            if not getattr(weight, "_is_hf_initialized", False):
                # As the linear map that it is, as in MAE.
                nn.init.xavier_uniform_(weight.flatten(1))
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, visible_patches: Tensor | None = None) -> Tensor:
        """(B, C, S, S) and (B, Pv) patch numbers to states (B, 1 + Pv, D), [CLS] first."""
        positions = self.embeddings.position_embeddings
        states = self.embeddings.patch_embeddings(pixel_values) + positions[:, 1:]
        if visible_patches is not None:
            states = take_rows(states, visible_patches)
        cls_state = (self.embeddings.cls_token + positions[:, :1]).expand(len(states), -1, -1)
        states = torch.cat([cls_state, states], dim=1)
        for layer in self.layers:
            states = layer(states)
        return self.layernorm(states)


class TimmImageEncoder(nn.Module):
    """A timm vision transformer with one [CLS] token, by name, with mpma_ext's attention.

    It starts from timm's own initial values and keeps timm's own positions, one a patch of
    image_size: for most models a learned table that is trained with the rest, where
    VitImageEncoder's sines and cosines stay fixed. They are added before patches are dropped, so
    that a visible patch keeps its place.

    Raises:
        ImportError: timm cannot be imported.
        ValueError: the model is no plain vision transformer, or a size of it is not the setting's.
    """

    def __init__(self, config: MpmaConfig):
        super().__init__()
        name = config.image_encoder.removeprefix("timm/")
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f'image_encoder "{config.image_encoder}" needs timm, which cannot be imported '
                f'({error}). Install it with pip install "mpma[timm]"'
            ) from error
        from mpma_ext.integrations.timm import use_mpma_attention

        size = {"img_size": config.image_size, "in_chans": config.num_channels}
        try:
            vit = timm.create_model(name, num_classes=0, **size)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"image_encoder: timm has no vision transformer {name} for {size} ({error})"
            ) from error
        if getattr(vit, "num_prefix_tokens", None) != 1 or not hasattr(vit, "_pos_embed"):
            raise ValueError(
                f"image_encoder: timm's {name} is no vision transformer with one class token"
            )
        try:
            sizes = _timm_sizes(vit)
        except AttributeError as error:
            raise ValueError(
                f"image_encoder: timm's {name} is not built of plain blocks ({error})"
            ) from error
        for setting, value in sizes.items():
            if value != getattr(config, setting):
                raise ValueError(
                    f"{setting} must be that of timm's {name}, {value}; "
                    f"got {getattr(config, setting)}"
                )
        for parameter in vit.parameters():
            # transformers' generic initial values would replace timm's; on the meta device, where
            # from_pretrained builds, there are none to keep.
            parameter._is_hf_initialized = not parameter.is_meta
        self.vit = use_mpma_attention(vit)

    def forward(self, pixel_values: Tensor, visible_patches: Tensor | None = None) -> Tensor:
        """(B, C, S, S) and (B, Pv) patch numbers to states (B, 1 + Pv, D), [CLS] first."""
        states = self.vit._pos_embed(self.vit.patch_embed(pixel_values))
        if visible_patches is not None:
            states = torch.cat([states[:, :1], take_rows(states[:, 1:], visible_patches)], dim=1)
        return self.vit.norm(self.vit.blocks(self.vit.norm_pre(states)))


def _timm_sizes(vit: nn.Module) -> dict[str, int | float]:
    """The settings of MpmaConfig that a timm vision transformer decides."""
    block = vit.blocks[0]
    return {
        "hidden_size": vit.embed_dim,
        "patch_size": vit.patch_embed.patch_size[0],
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
    }


def build_image_encoder(config: MpmaConfig) -> nn.Module:
    """The encoder that `config.image_encoder` names."""
    if config.image_encoder == "vit":
        return VitImageEncoder(config.vit_config())
    return TimmImageEncoder(config)


def fixed_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of MAE for side² patches, after a zero row for [CLS]: (1 + side², width).

    The first half tells the column and the second the row, as in MAE's published weights.
    """
    rows_first = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    return rows_first.roll(width // 2, dims=1)


def take_rows(states: Tensor, numbers: Tensor) -> Tensor:
    """Rows `numbers` (B, K) of states (B, P, D): (B, K, D)."""
    return states.gather(1, numbers.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def two_resolutions(pixel_values: Tensor, config: MpmaConfig) -> tuple[Tensor, Tensor]:
    """The image the encoder sees and the image to reconstruct.

    An image of image_size · target_scale is the target itself and is averaged for the encoder; one
    of image_size is enlarged bilinearly for the target, which adds no detail.

    Args:
        pixel_values: (B, C, S, S) floating, S = image_size · target_scale or image_size.

    Returns:
        (B, C, image_size, image_size) and (B, C, target_size, target_size).

    Raises:
        ValueError: another shape or dtype.
    """
    small, large, channels = config.image_size, config.target_size, config.num_channels
    shapes = {(channels, side, side) for side in (small, large)}
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) not in shapes:
        expected = " or ".join(f"(B, {c}, {h}, {w})" for c, h, w in sorted(shapes, reverse=True))
        raise ValueError(f"pixel_values must be {expected}, got {tuple(pixel_values.shape)}")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values must be floating point, got {pixel_values.dtype}")
    if pixel_values.shape[-1] == large:
        return F.avg_pool2d(pixel_values, config.target_scale), pixel_values
    target = F.interpolate(pixel_values, size=(large, large), mode="bilinear", align_corners=False)
    return pixel_values, target


def fold_channels(
    weight: Tensor,
    bias: Tensor,
    from_mean: tuple[float, ...],
    from_std: tuple[float, ...],
    to_mean: float,
    to_std: float,
) -> tuple[Tensor, Tensor]:
    """A patch embedding for several channels, as one for a single grey channel.

    With x_c = (g - m_c) / s_c the channels a model was trained on and y = (g - m) / s ours, of the
    same grey value g, Σ_c w_c x_c + b = w y + b' for w = s Σ_c w_c / s_c and
    b' = b + Σ_c Σ w_c (m - m_c) / s_c, the inner sum over the pixels of a patch.

    Args:
        weight: (D, C, p, p).
        bias: (D,).
        from_mean, from_std: the C means and deviations the weights were trained with.
        to_mean, to_std: ours.

    Returns:
        weight (D, 1, p, p) and bias (D,).

    Raises:
        ValueError: the number of means or deviations is not C.
    """
    if not len(from_mean) == len(from_std) == weight.shape[1]:
        raise ValueError(
            f"from_mean and from_std must have {weight.shape[1]} values, one a channel of weight; "
            f"got {len(from_mean)} and {len(from_std)}"
        )
    scaled = weight / weight.new_tensor(from_std).view(1, -1, 1, 1)
    shift = to_mean - weight.new_tensor(from_mean).view(1, -1, 1, 1)
    return to_std * scaled.sum(dim=1, keepdim=True), bias + (scaled * shift).sum(dim=(1, 2, 3))
