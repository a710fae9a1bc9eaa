"""Which implementation serves a call.

An operator lists its backends from the fastest down, and for each a reason why it cannot serve this
call, or None. The choice falls in Python, before the operator, so that the backward follows it.
"""

import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
OPERATORS = (
    "masked_attention",
    "masked_attention_qkvpacked",
    "masked_attention_varlen",
    "memory_attention",
    "token_patch_similarity",
    "token_patch_max_similarity",
)

# Read once from the dispatcher: a kernel that is compiled in is thereby available.
COMPILED = {
    backend: frozenset(
        operator
        for operator in OPERATORS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"mpma::{operator}", key)
    )
    for backend, key in (("cpu", "CPU"), ("cuda", "CUDA"))
}

# Triton's interpreter, which runs its kernels on CPU tensors, is chosen when Triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

# What no machine has shown to be the fastest serves only where it is asked for by name.
UNMEASURED = frozenset({"cuda", "triton"})

_local = threading.local()


def available_backends() -> list[str]:
    """Names of the backends that can serve at least one operator on this machine."""
    usable = {
        "cuda": bool(COMPILED["cuda"]) and torch.cuda.is_available(),
        "triton": HAS_TRITON and (INTERPRETED or torch.cuda.is_available()),
        "cpu": bool(COMPILED["cpu"]),
        "torch": True,
        "reference": True,
    }
    return [name for name in BACKENDS if usable[name]]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within this context, calls of this thread that name no backend use `name`.

    Raises:
        ValueError: `name` is no backend.
    """
    _check_name(name)
    before = getattr(_local, "backend", None)
    _local.backend = name
    try:
        yield
    finally:
        _local.backend = before


def compiled_refusal(backend: str, operator: str, tensor: torch.Tensor) -> str | None:
    """Why a compiled backend ("cpu" or "cuda") cannot serve a call on `tensor`, or None."""
    if tensor.device.type != backend:
        return f"it serves {backend} tensors, these are on {tensor.device}"
    if operator not in COMPILED[backend]:
        return f"this build has no compiled {backend} kernel of {operator}"
    if backend == "cuda" and tensor.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, not float64"
    return None


def triton_refusal(tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel can serve a call on `tensor`, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    device = tensor.device.type
    if device == "cpu" and not INTERPRETED:
        return "it serves CPU tensors under TRITON_INTERPRET=1 only"
    if device not in ("cpu", "cuda"):
        return f"it serves cuda tensors, these are on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, not float64"
    return None


def too_wide(width: int, largest: int) -> str | None:
    """Why a kernel for widths up to `largest` cannot serve, or None."""
    return None if width <= largest else f"it serves widths up to {largest}, this is {width}"


def choose(
    operator: str,
    backend: str | None,
    refusals: Mapping[str, str | None],
    avoid: frozenset[str] = frozenset(),
) -> str:
    """The backend of one call.

    Args:
        operator: its name, for messages.
        backend: what the caller asked for, or None.
        refusals: for every backend that has an implementation, from the fastest down, the reason
            why it cannot serve this call, or None.
        avoid: backends that may serve only where they are asked for by name.

    Raises:
        ValueError: the backend that was asked for does not exist or cannot serve.
    """
    _check_name(backend)
    if backend is None:
        backend = getattr(_local, "backend", None)
    if backend is None:
        avoid = avoid | UNMEASURED  # |= is nothing that the compiler of torch 2.11 traces
        for name, refusal in refusals.items():
            if refusal is None and name not in avoid:
                return name
    refusal = refusals.get(backend, f"there is no {backend} implementation of {operator}")
    if refusal is not None:
        raise ValueError(f'{operator}: backend="{backend}" cannot serve this call: {refusal}')
    return backend


def _check_name(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
