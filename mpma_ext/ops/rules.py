"""What PyTorch is told of an operator beside its kernels: autocast, and derivatives' limits."""

import functools
from collections.abc import Callable

import torch


def under_autocast(operator: str, **operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Floating tensors in autocast's dtype where it is on, float64 aside; else as they are."""
    for name, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
    tensors = tuple(operands.values())
    device = tensors[0].device.type
    # meta, which holds no data, knows no autocast and raises when asked. The compiler of torch 2.11
    # does not trace torch.amp.is_autocast_available, which would tell.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(_cast(tensor, torch.get_autocast_dtype(device)) for tensor in tensors)


def operator_for(operator: str, backend: str) -> Callable:
    """The torch.ops.mpma.* behind which `backend` has its kernel."""
    return getattr(torch.ops.mpma, f"{operator}_triton" if backend == "triton" else operator)


def register_rules(
    operator: str,
    *,
    fake: Callable,
    fake_backward: Callable,
    setup_context: Callable,
    backward: Callable,
) -> None:
    """Tell PyTorch the shapes, derivative and autocast of an operator, and of its Triton twin.

    Args:
        operator: its public name.
        fake, fake_backward: empty results for the arguments of the schemas.
        setup_context: as of torch.library.register_autograd.
        backward: (operator's backward, ctx, *gradients) -> gradients of the arguments.
    """
    for name in (operator, f"{operator}_triton"):
        of_backward = f"{name}_backward"
        torch.library.register_fake(f"mpma::{name}", fake)
        torch.library.register_fake(f"mpma::{of_backward}", fake_backward)
        rule = functools.partial(backward, getattr(torch.ops.mpma, of_backward))
        torch.library.register_autograd(f"mpma::{name}", rule, setup_context=setup_context)
        torch.library.register_autograd(f"mpma::{of_backward}", _refusal(operator))
        _register_autocast(name)


def _register_autocast(operator: str) -> None:
    """Under autocast, torch.ops.mpma.<operator> casts its floating tensors, float64 aside."""

    def rule_of(device: str) -> Callable:
        def rule(*arguments):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return getattr(torch.ops.mpma, operator)(*(_cast(a, dtype) for a in arguments))

        return rule

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        torch.library.impl(f"mpma::{operator}", key)(rule_of(device))


def _refusal(operator: str) -> Callable:
    """The derivative of a backward, which has none."""

    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{operator}: the kernels' backward has no derivative of its own; "
            'use backend="reference" for second derivatives'
        )

    return backward


def needed(gradient: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    """A gradient as autograd wants it: None where the kernel was told to leave it out."""
    return gradient if wanted else None


def fake_gradients(*pairs: tuple[torch.Tensor, bool]) -> tuple[torch.Tensor, ...]:
    """What a backward returns in shapes: contiguous as its tensor, empty where not wanted."""
    return tuple(
        tensor.new_empty(tensor.shape) if wanted else tensor.new_empty(0)
        for tensor, wanted in pairs
    )


def _cast(argument, dtype: torch.dtype):
    if (
        isinstance(argument, torch.Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
    ):
        return argument.to(dtype)
    return argument
