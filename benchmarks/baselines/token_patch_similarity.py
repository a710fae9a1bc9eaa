"""Similarity of every report with every image in plain PyTorch.

tokens (Bt, T, D) with token_mask (Bt, T) bool, True = real; patches (Bi, P, D), all of them real.
(Bt, Bi) in the dtype of the inputs comes back. Temperatures are GLoRIA's, 4 and 5.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.baselines import max_similarity_peers
from benchmarks.baselines.compiled import compiled

ATTENTION_TEMPERATURE = 4.0
POOLING_TEMPERATURE = 5.0
NORM_EPSILON = 1e-8


def field(tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """GLoRIA's loop (Huang et al., ICCV 2021): a report at a time, repeated for every image."""
    rows = []
    for number, words in enumerate(tokens):
        real = words if token_mask is None else words[token_mask[number]]
        words = real.repeat(len(patches), 1, 1)
        scores = torch.bmm(patches, words.transpose(1, 2))
        over_words = scores.softmax(2).transpose(1, 2)
        attention = (ATTENTION_TEMPERATURE * over_words).softmax(2)
        context = torch.bmm(attention, patches)
        cosine = cosine_similarity(words, context, dim=2, eps=NORM_EPSILON)
        rows.append((POOLING_TEMPERATURE * cosine).exp().sum(1).log())
    return torch.stack(rows)


def eager(tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """All pairs at once, with |c|² = bᵀ (V Vᵀ) b in place of the context c = bᵀ V."""
    scores, b = _scores_and_attention(tokens, patches, token_mask)
    gram = torch.bmm(patches, patches.mT)
    square = (b * torch.bmm(gram, b.flatten(2)).view_as(b)).sum(1)
    return _pooled((b * scores).sum(1), square, tokens, token_mask)


def eager_context(tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """All pairs at once, with the context written out: fewer operations from P = D on."""
    scores, b = _scores_and_attention(tokens, patches, token_mask)
    context = torch.bmm(patches.mT, b.flatten(2))
    square = (context * context).sum(1).view(len(patches), *tokens.shape[:2])
    return _pooled((b * scores).sum(1), square, tokens, token_mask)


def max_eager(
    tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """FILIP's two directions (Yao et al., ICLR 2022): einsum, then amax over patches and tokens."""
    scores = torch.einsum("jtd,ipd->jitp", tokens, patches)
    if token_mask is None:
        return scores.amax(3).mean(2), scores.amax(2).mean(2)
    return _masked_means(scores.amax(3), _hidden(scores, token_mask).amax(2), token_mask)


def max_eager_indexed(
    tokens: Tensor, patches: Tensor, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by max, whose backward scatters to the saved index instead of comparing again."""
    scores = torch.einsum("jtd,ipd->jitp", tokens, patches)
    if token_mask is None:
        return scores.max(3).values.mean(2), scores.max(2).values.mean(2)
    of_patch = _hidden(scores, token_mask).max(2).values
    return _masked_means(scores.max(3).values, of_patch, token_mask)


def _scores(tokens: Tensor, patches: Tensor) -> Tensor:
    """⟨w_t, v_p⟩ as (Bi, P, Bt, T): one product, and contiguous for everything that follows."""
    product = patches.flatten(0, 1) @ tokens.flatten(0, 1).T
    return product.view(*patches.shape[:2], *tokens.shape[:2])


def _scores_and_attention(
    tokens: Tensor, patches: Tensor, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scores and the weights b of the patches, both (Bi, P, Bt, T)."""
    scores = shown = _scores(tokens, patches)
    if token_mask is not None:
        shown = scores.masked_fill(~token_mask, -torch.inf)
    return scores, (ATTENTION_TEMPERATURE * shown.softmax(3)).softmax(1)


def _pooled(dot: Tensor, square: Tensor, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    """(Bt, Bi) from ⟨w, c⟩ and |c|², both (Bi, Bt, T)."""
    exponent = POOLING_TEMPERATURE * dot / (_norm((tokens * tokens).sum(2)) * _norm(square))
    if token_mask is not None:
        exponent = exponent.masked_fill(~token_mask, -torch.inf)
    return exponent.logsumexp(2).T


def _hidden(scores: Tensor, token_mask: Tensor) -> Tensor:
    """(Bt, Bi, T, P) scores with -inf for tokens that are not real."""
    return scores.masked_fill(~token_mask[:, None, :, None], -torch.inf)


def _masked_means(of_token: Tensor, of_patch: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Means of (Bt, Bi, T) over the real tokens and of (Bt, Bi, P) over the patches."""
    of_token = of_token.masked_fill(~token_mask[:, None], 0).sum(2)
    return of_token / token_mask.sum(1, keepdim=True), of_patch.mean(2)


def _norm(square: Tensor) -> Tensor:
    return square.clamp(min=NORM_EPSILON**2).sqrt()


BASELINES = {
    "field": field,
    "eager": eager,
    "eager_context": eager_context,
    "compiled": compiled(eager),
}
MAX_BASELINES = {
    "eager": max_eager,
    "eager_indexed": max_eager_indexed,
    "compiled": compiled(max_eager),
    "late_interaction": max_similarity_peers.late_interaction,
    "flash_maxsim": max_similarity_peers.flash_maxsim,
}
