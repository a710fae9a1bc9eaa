"""MA-CMF: the masked report reads the image, both having read one shared memory.

The paper's module could not be read. The memory is R2GenCMN's (Chen et al., ACL 2021), with its
bank projected once a step; `kv_concat` is the Meshed-Memory Transformer's (Cornia et al., CVPR
2020); `gap_add` is MRM's (Zhou et al., ICLR 2023). Everything else is our choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

import mpma_ext
from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.layers import GainLinear

# How many states the log of the memory's use looks at: enough to see a collapse, next to free.
_USE_SAMPLE = 256


@dataclass
class MemoryUse:
    """How a sample of states reads the memory, both values 0-dimensional.

    Attributes:
        used_share: share of the slots that some head of some state reads.
        perplexity: exp of the entropy of the attention that the slots get, 1 to memory_slots.
    """

    used_share: Tensor
    perplexity: Tensor


class SharedMemory(nn.Module):
    """X' = X + Wo · memory_attention(LN(X) Wq, LN(M) Wk, LN(M) Wv), for both modalities alike.

    Without the LayerNorm on M its small initial values would give flat weights and hardly any
    response; for the same reason the projections start at unit gain.
    """

    def __init__(self, config: MpmaConfig):
        super().__init__()
        width = config.hidden_size
        self.topk, self.heads = config.memory_topk, config.num_attention_heads
        self.dropout = config.fusion_dropout
        self.memory = nn.Parameter(torch.empty(config.memory_slots, width))
        self.state_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.memory_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.query, self.key = GainLinear(width, width), GainLinear(width, width)
        self.value, self.output = GainLinear(width, width), GainLinear(width, width)

    def forward(self, *states: Tensor) -> tuple[list[Tensor], MemoryUse]:
        """Each (..., D), having read the memory; all in one call, the bank projected once."""
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in states])
        bank = self.memory_norm(self.memory)
        query = _split_heads(self.query(self.state_norm(rows)), self.heads)
        key = _split_heads(self.key(bank), self.heads)
        read = mpma_ext.memory_attention(
            query,
            key,
            _split_heads(self.value(bank), self.heads),
            topk=self.topk,
            dropout_p=self.dropout if self.training else 0.0,
        )
        rows = rows + self.output(read.flatten(1))
        parts = rows.split([x.numel() // x.shape[-1] for x in states])
        return [p.view_as(x) for p, x in zip(parts, states, strict=True)], self._use(query, key)

    @torch.no_grad()
    def _use(self, query: Tensor, key: Tensor) -> MemoryUse:
        sample = query[:: max(1, len(query) // _USE_SAMPLE)][:_USE_SAMPLE].float()
        scores = torch.einsum("rhd,nhd->rhn", sample, key.float()) * query.shape[-1] ** -0.5
        best, slots = scores.topk(min(self.topk, scores.shape[-1]), dim=-1)
        mass = torch.zeros_like(scores).scatter(-1, slots, best.softmax(-1)).sum(dim=(0, 1))
        share = mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)
        return MemoryUse((mass > 0).float().mean(), torch.special.entr(share).sum().exp())


class CrossAttention(nn.Module):
    """Packed reports attend to the patches of their images, and to learned slots if any.

    The slots are scaled so that a key and a value of them have unit variance at the start.
    """

    def __init__(self, config: MpmaConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.fusion_dropout
        self.query, self.key = GainLinear(width, width), GainLinear(width, width)
        self.value, self.output = GainLinear(width, width), GainLinear(width, width)
        self.slots = config.kv_concat_slots if config.fusion == "kv_concat" else 0
        if self.slots:
            self.slot_key = nn.Parameter(torch.empty(self.slots, width))
            self.slot_value = nn.Parameter(torch.empty(self.slots, width))

    def forward(
        self, states: Tensor, image_states: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Packed states (N, D) and image states (B, P, D) to (N, D)."""
        key, value = self.key(image_states), self.value(image_states)
        if self.slots:
            width, batch = key.shape[-1], len(key)
            slot_key = self.slot_key * (width // self.heads) ** 0.5
            slot_value = self.slot_value * self.slots**0.5
            key = torch.cat([key, slot_key.to(key.dtype).expand(batch, -1, -1)], dim=1)
            value = torch.cat([value, slot_value.to(value.dtype).expand(batch, -1, -1)], dim=1)
        batch, keys = key.shape[:2]
        cu_keys = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * keys
        read = mpma_ext.masked_attention_varlen(
            _split_heads(self.query(states), self.heads),
            _split_heads(key.flatten(0, 1), self.heads),
            _split_heads(value.flatten(0, 1), self.heads),
            cu_seqlens,
            cu_keys,
            max_seqlen,
            keys,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(read.flatten(1))


class FusionBlock(GradientCheckpointingLayer):
    """Pre-norm cross-attention and feed-forward, each on a residual branch."""

    def __init__(self, config: MpmaConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.image_norm = nn.LayerNorm(width, eps=eps)
        self.attention = CrossAttention(config)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width, eps=eps),
            nn.Linear(width, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.intermediate_size, width),
        )
        self.dropout = nn.Dropout(config.fusion_dropout)

    def forward(
        self, states: Tensor, image_states: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Packed states (N, D) and image states (B, P, D) to (N, D)."""
        read = self.attention(
            self.attention_norm(states), self.image_norm(image_states), cu_seqlens, max_seqlen
        )
        states = states + self.dropout(read)
        return states + self.dropout(self.feed_forward(states))


class CrossModalFusion(nn.Module):
    """MA-CMF for "memory", "kv_concat" and "cross_attention"."""

    def __init__(self, config: MpmaConfig):
        super().__init__()
        same = config.text_hidden_size == config.hidden_size
        self.text_projection = (
            nn.Identity() if same else nn.Linear(config.text_hidden_size, config.hidden_size)
        )
        self.memory = SharedMemory(config) if config.fusion == "memory" else None
        self.blocks = nn.ModuleList([FusionBlock(config) for _ in range(config.fusion_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, text_states: Tensor, patch_states: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, MemoryUse | None]:
        """Fused states of packed reports.

        Args:
            text_states: (N, Dt), packed.
            patch_states: (B, P, D), the patches without [CLS].
            cu_seqlens: (B + 1,) int32, where each report starts.
            max_seqlen: an upper bound of the reports' lengths.

        Returns:
            (N, D), and how the memory was used where there is one.
        """
        states, use = self.text_projection(text_states), None
        if self.memory is not None:
            (states, patch_states), use = self.memory(states, patch_states)
        for block in self.blocks:
            states = block(states, patch_states, cu_seqlens, max_seqlen)
        return self.norm(states), use


class GapAddFusion(nn.Module):
    """MRM's fusion: what is added to every token embedding of the masked report, (B, D) to (B, Dt).

    Its input is the mean of the patches the encoder saw.
    """

    def __init__(self, config: MpmaConfig):
        super().__init__()
        # As small as the word embeddings it is added to: with unit gain nothing of them would be
        # left after the normalisation that follows.
        gain = config.text_initializer_range
        self.projection = GainLinear(config.hidden_size, config.text_hidden_size, gain)

    def forward(self, patch_states: Tensor) -> Tensor:
        """(B, P, D) to (B, Dt)."""
        return self.projection(patch_states.mean(dim=1))


def _split_heads(states: Tensor, heads: int) -> Tensor:
    """(N, H·d) to (N, H, d)."""
    return states.unflatten(-1, (heads, -1))
