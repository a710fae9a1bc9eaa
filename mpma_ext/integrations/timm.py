"""mpma attention in timm's vision transformers, one model at a time."""

# timm.layers has this class only in later 1.0 releases; here it stands in every one.
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import mpma_ext


class MpmaAttention(Attention):
    """timm's `Attention` with its weights, norms and dropout, computed by mpma_ext."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Self-attention of x (B, N, C); returns (B, N, C).

        Raises:
            ValueError: a mask or causal attention is asked for.
        """
        if attn_mask is not None or is_causal:
            asked = "causal attention" if is_causal else f"an attn_mask {tuple(attn_mask.shape)}"
            raise ValueError(
                f"{type(self).__name__} attends to every patch, without a mask; the model asked "
                f"for {asked}"
            )
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        settings = {
            "scale": self.scale,
            "dropout_p": self.attn_drop.p if self.training else 0.0,
        }
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            heads = mpma_ext.masked_attention_qkvpacked(qkv, **settings)
        else:
            query, key, value = qkv.unbind(2)
            heads = mpma_ext.masked_attention(
                self.q_norm(query), self.k_norm(key), value, **settings
            )
        output = heads.flatten(2)
        # Both came with later 1.0 releases.
        if (norm := getattr(self, "norm", None)) is not None:
            output = norm(output)
        if (gate := getattr(self, "gate", None)) is not None:
            output = output * gate(x).sigmoid()
        return self.proj_drop(self.proj(output))


def use_mpma_attention(model: nn.Module) -> nn.Module:
    """Compute the self-attention of a timm vision transformer with mpma_ext, in place.

    Every `timm.layers.Attention` in the model changes its class; weights, state-dict names, hooks
    and other models stay as they are. Attention of other kinds (EVA, differential, Swin windows)
    is not touched. Calling it again changes nothing.

    Returns the model.

    Raises:
        ValueError: the model has no such attention.
    """
    # A subclass with a forward of its own computes something else.
    ours = (Attention.forward, MpmaAttention.forward)
    layers = [m for m in model.modules() if type(m).forward in ours]
    if not layers:
        raise ValueError(
            "use_mpma_attention: expected a timm vision transformer built of "
            f"timm.layers.Attention, found none in {type(model).__name__}"
        )
    for layer in layers:
        layer.__class__ = MpmaAttention
    return model
