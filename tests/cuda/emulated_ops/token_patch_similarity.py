"""The softmax form of token-patch similarity on the emulated machine."""

import torch

from emulated_ops import device, new_gradients, suffix, wanted

# Little, so that small shapes already take several blocks.
WORKSPACE_LIMIT = 48 << 10


class _Call:
    """Operands on the device, and what every launcher is told of them."""

    def __init__(
        self,
        tokens: torch.Tensor,
        patches: torch.Tensor,
        token_mask: torch.Tensor | None,
        patch_mask: torch.Tensor | None,
        attention_temperature: float,
        pooling_temperature: float,
    ):
        self.device = device("token_patch_similarity")
        self.type = suffix(tokens)
        self.temperatures = (float(attention_temperature), float(pooling_temperature))
        sides = ((tokens, token_mask), (patches, patch_mask))
        self.operands = [
            None if x is None else self.device.put(x)
            for x in (tokens, patches, token_mask, patch_mask)
        ]
        addresses = [0 if x is None else x.data_ptr() for x in self.operands]
        sizes = [
            size
            for rows, mask in sides
            for size in (*rows.shape, *rows.stride(), *((0, 0) if mask is None else mask.stride()))
        ]
        self.pointers = torch.tensor(addresses)
        self.sizes = torch.tensor([*sizes, WORKSPACE_LIMIT])

    def workspace(self, backward: bool) -> torch.Tensor:
        bytes_ = torch.zeros(2, dtype=torch.int64)
        self.device.call(f"workspace_{self.type}", self.pointers, self.sizes, bytes_)
        return self.device.empty((int(bytes_[int(backward)]),), torch.uint8)


def token_patch_similarity(
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    attention_temperature: float,
    pooling_temperature: float,
) -> torch.Tensor:
    call = _Call(
        tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature
    )
    out = call.device.empty((len(tokens), len(patches)), torch.float32)
    workspace = call.workspace(False)
    call.device.call(
        f"forward_{call.type}", call.pointers, call.sizes, workspace, out, *call.temperatures
    )
    return out


def token_patch_similarity_backward(
    grad_output: torch.Tensor,
    tokens: torch.Tensor,
    patches: torch.Tensor,
    token_mask: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    attention_temperature: float,
    pooling_temperature: float,
    need_tokens: bool,
    need_patches: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(
        tokens, patches, token_mask, patch_mask, attention_temperature, pooling_temperature
    )
    needs = (need_tokens, need_patches)
    grads = new_gradients(call.device, (tokens, patches), needs)
    grad = call.device.put(grad_output)
    call.device.call(
        f"backward_{call.type}",
        call.pointers,
        call.sizes,
        call.workspace(True),
        grad,
        *grad.stride(),
        *wanted(grads, needs),
        *call.temperatures,
    )
    return grads
