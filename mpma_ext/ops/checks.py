"""Checks of arguments. Each error names the argument, what was expected and what came."""

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(operator: str, **operands: torch.Tensor) -> None:
    """All are tensors of one supported floating dtype on one device."""
    (first_name, first), *_ = operands.items()
    for name, tensor in operands.items():
        if tensor.dtype not in FLOATING:
            raise ValueError(
                f"{operator}: {name} must be float32, bfloat16, float16 or float64, "
                f"got {tensor.dtype}"
            )
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{operator}: {name} must have {first_name}'s dtype {first.dtype}, "
                f"got {tensor.dtype}"
            )
        _check_device(operator, name, tensor, first_name, first)


def check_shape(
    operator: str, name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], spelled: str
) -> None:
    """The tensor has the expected shape, None standing for any size; `spelled` is it in letters."""
    fits = tensor.dim() == len(expected) and all(
        want is None or want == got for want, got in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        sizes += "," if len(expected) == 1 else ""
        raise ValueError(
            f"{operator}: {name} must have shape {spelled} = ({sizes}), got {tuple(tensor.shape)}"
        )


def check_mask(
    operator: str, name: str, mask: torch.Tensor | None, like: torch.Tensor, spelled: str
) -> None:
    """The mask is None or bool, on the device of `like`, of its first two sizes."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"{operator}: {name} must be a bool tensor (True = attend, real), got {got}"
        )
    check_shape(operator, name, mask, tuple(like.shape[:2]), spelled)
    _check_device(operator, name, mask, "the operands", like)


def check_dropout(
    operator: str, dropout_p: float, dropout_seed: torch.Tensor | int | None, like: torch.Tensor
) -> None:
    """A probability in [0, 1); a seed that is None, an int, or one int64 on the right device."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_seed is None or isinstance(dropout_seed, int):
        return
    if (
        not isinstance(dropout_seed, torch.Tensor)
        or dropout_seed.dtype != torch.int64
        or dropout_seed.numel() != 1
    ):
        got = (
            f"{dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}"
            if isinstance(dropout_seed, torch.Tensor)
            else type(dropout_seed).__name__
        )
        raise ValueError(
            f"{operator}: dropout_seed must be an int, a one-element int64 tensor or None, "
            f"got {got}"
        )
    _check_device(operator, "dropout_seed", dropout_seed, "the operands", like)


def check_cu_seqlens(
    operator: str, name: str, cu_seqlens: torch.Tensor, like: torch.Tensor
) -> None:
    """int32 (B + 1,) on the device of `like`. What it holds is not looked at."""
    if (
        not isinstance(cu_seqlens, torch.Tensor)
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.dim() != 1
        or cu_seqlens.shape[0] < 1
    ):
        got = (
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, torch.Tensor)
            else type(cu_seqlens).__name__
        )
        raise ValueError(f"{operator}: {name} must be an int32 tensor of shape (B + 1,), got {got}")
    _check_device(operator, name, cu_seqlens, "the operands", like)


def _check_device(
    operator: str, name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor
) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of {like_name}, {like.device}, "
            f"got {tensor.device}"
        )
