"""What precision the definitions compute in."""

import functools

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def outside_autocast(function):
    """Run `function` with autocast off, so that no product inside is narrowed behind its back."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        operand = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if not torch.amp.is_autocast_available(operand.device.type):
            return function(*args, **kwargs)
        with torch.autocast(operand.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Softmax over the entries where `mask` is True; 0 elsewhere, also where nothing is True."""
    if mask is None:
        return scores.softmax(dim)
    return scores.masked_fill(~mask, -torch.inf).softmax(dim).masked_fill(~mask, 0)
