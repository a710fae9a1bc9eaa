"""Repairs Triton's interpreter, which runs kernels on the CPU where TRITON_INTERPRET=1 is set."""

import triton.runtime.interpreter as interpreter


def repair() -> None:
    """Lets loops run to a kernel's arguments under numpy 2.4.

    The interpreter keeps scalars as arrays of one element, and makes a loop's bound of one by
    int(), which numpy no longer allows.
    """
    patch = interpreter._patch_lang_tensor
    if patch is not _patch_lang_tensor:
        _patch_lang_tensor.patch = patch
        interpreter._patch_lang_tensor = _patch_lang_tensor


def _patch_lang_tensor(tensor, scope) -> None:
    _patch_lang_tensor.patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
