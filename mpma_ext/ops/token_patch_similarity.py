"""Similarity of every report with every image: checks, choice of backend, rules."""

import torch

from mpma_ext import reference
from mpma_ext.backends import choose, compiled_refusal, too_wide, triton_refusal
from mpma_ext.ops.checks import check_floating, check_mask, check_shape
from mpma_ext.ops.rules import (
    fake_gradients,
    needed,
    operator_for,
    register_rules,
    under_autocast,
)
from mpma_ext.reference.precision import compute_dtype


def token_patch_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    patch_mask: torch.Tensor | None = None,
    attention_temperature: float = 4.0,
    pooling_temperature: float = 5.0,
    backend: str | None = None,
) -> torch.Tensor:
    """GLoRIA's local similarity of every report j with every image i.

    For token t and patch p:

        a[t,p] = softmax over the real tokens t of ⟨w_t, v_p⟩
        b[t,p] = softmax over the real patches p of attention_temperature · a[t,p]
        c_t    = Σ_p b[t,p] · v_p
        out[j,i] = log Σ_{real t} exp(pooling_temperature · cos(w_t, c_t))

    Args:
        tokens: (Bt, T, D); float32, bfloat16, float16 or float64.
        patches: (Bi, P, D); dtype and device of tokens.
        token_mask: (Bt, T) bool, True = real. What is masked may hold anything.
        patch_mask: (Bi, P) bool, True = real.
        attention_temperature, pooling_temperature: factors of the two exponents.
        backend: None picks the fastest that can serve; see `mpma_ext.available_backends`.

    Returns:
        (Bt, Bi), float32 (float64 for float64 inputs); 0, without gradient, where a report has no
        real token or an image no real patch.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot serve.

    Huang et al., "GLoRIA: a multimodal global-local representation learning framework" (ICCV 2021).
    """
    name = "token_patch_similarity"
    tokens, patches = _checked(name, tokens, patches, token_mask, patch_mask)
    temperatures = (float(attention_temperature), float(pooling_temperature))
    chosen = choose(name, backend, _refusals(name, tokens))
    if chosen == "reference":
        return reference.token_patch_similarity(
            tokens,
            patches,
            token_mask=token_mask,
            patch_mask=patch_mask,
            attention_temperature=temperatures[0],
            pooling_temperature=temperatures[1],
        )
    return operator_for(name, chosen)(tokens, patches, token_mask, patch_mask, *temperatures)


def token_patch_max_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    patch_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FILIP's similarities of every report with every image, both directions from one product.

    Args:
        tokens: (Bt, T, D); float32, bfloat16, float16 or float64.
        patches: (Bi, P, D); dtype and device of tokens.
        token_mask: (Bt, T) bool, True = real. What is masked may hold anything.
        patch_mask: (Bi, P) bool, True = real.
        backend: None picks the fastest that can serve; see `mpma_ext.available_backends`.

    Returns:
        Two (Bt, Bi) tensors, float32 (float64 for float64 inputs): the mean over real tokens of the
        maximum over real patches of ⟨w_t, v_p⟩, and the mean over real patches of the maximum over
        real tokens. Of equal products the lowest index gets the gradient. 0, without gradient,
        where a report has no real token or an image no real patch.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot serve.

    Yao et al., "FILIP: fine-grained interactive language-image pre-training" (ICLR 2022).
    """
    name = "token_patch_max_similarity"
    tokens, patches = _checked(name, tokens, patches, token_mask, patch_mask)
    chosen = choose(name, backend, _refusals(name, tokens))
    if chosen == "reference":
        return reference.token_patch_max_similarity(
            tokens, patches, token_mask=token_mask, patch_mask=patch_mask
        )
    to_patches, to_tokens, _, _ = operator_for(name, chosen)(
        tokens, patches, token_mask, patch_mask
    )
    return to_patches, to_tokens


def _checked(name, tokens, patches, token_mask, patch_mask):
    """Tokens and patches as autocast wants them, after the checks the two forms share."""
    tokens, patches = under_autocast(name, tokens=tokens, patches=patches)
    check_floating(name, tokens=tokens, patches=patches)
    check_shape(name, "tokens", tokens, (None, None, None), "(Bt, T, D)")
    check_shape(name, "patches", patches, (None, None, tokens.shape[2]), "(Bi, P, D)")
    check_mask(name, "token_mask", token_mask, tokens, "(Bt, T)")
    check_mask(name, "patch_mask", patch_mask, patches, "(Bi, P)")
    return tokens, patches


def _refusals(name: str, tokens: torch.Tensor) -> dict[str, str | None]:
    return {
        "cuda": compiled_refusal("cuda", name, tokens),
        "triton": triton_refusal(tokens) or too_wide(tokens.shape[-1], 1024),
        "cpu": compiled_refusal("cpu", name, tokens),
        "torch": "PyTorch has no fused kernel of it",
        "reference": None,
    }


def _similarity_fake(
    tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature
):
    shape = (tokens.shape[0], patches.shape[0])
    return tokens.new_empty(shape, dtype=compute_dtype(tokens))


def _similarity_backward_fake(grad_output, tokens, patches, *rest):
    return fake_gradients(*zip((tokens, patches), rest[-2:], strict=True))


def _similarity_context(ctx, inputs, output):
    *tensors, ctx.attention_temperature, ctx.pooling_temperature = inputs
    ctx.save_for_backward(*tensors)


def _similarity_backward(operator, ctx, grad_output):
    wanted = ctx.needs_input_grad[:2]
    gradients = operator(
        grad_output,
        *ctx.saved_tensors,
        ctx.attention_temperature,
        ctx.pooling_temperature,
        *wanted,
    )
    return (*map(needed, gradients, wanted), None, None, None, None)


def _max_fake(tokens, patches, token_mask, patch_mask):
    shape = (tokens.shape[0], patches.shape[0])
    return (
        tokens.new_empty(shape, dtype=compute_dtype(tokens)),
        tokens.new_empty(shape, dtype=compute_dtype(tokens)),
        tokens.new_empty((*shape, tokens.shape[1]), dtype=torch.int32),
        tokens.new_empty((*shape, patches.shape[1]), dtype=torch.int32),
    )


def _max_backward_fake(grad_to_patches, grad_to_tokens, tokens, patches, *rest):
    return fake_gradients(*zip((tokens, patches), rest[-2:], strict=True))


def _max_context(ctx, inputs, output):
    _, _, patch_index, token_index = output
    ctx.mark_non_differentiable(patch_index, token_index)
    ctx.save_for_backward(*inputs, patch_index, token_index)


def _max_backward(operator, ctx, grad_tokens_to_patches, grad_patches_to_tokens, *_):
    wanted = ctx.needs_input_grad[:2]
    gradients = operator(
        grad_tokens_to_patches, grad_patches_to_tokens, *ctx.saved_tensors, *wanted
    )
    return (*map(needed, gradients, wanted), None, None)


register_rules(
    "token_patch_similarity",
    fake=_similarity_fake,
    fake_backward=_similarity_backward_fake,
    setup_context=_similarity_context,
    backward=_similarity_backward,
)
register_rules(
    "token_patch_max_similarity",
    fake=_max_fake,
    fake_backward=_max_backward_fake,
    setup_context=_max_context,
    backward=_max_backward,
)
