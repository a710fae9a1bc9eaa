"""Repairs Triton's interpreter, which runs kernels on the CPU where TRITON_INTERPRET=1 is set."""

from types import SimpleNamespace

import triton.language as tl
import triton.runtime.interpreter as interpreter


def repair() -> None:
    """Lets loops run to a kernel's arguments under numpy 2.4, and takes half the time.

    The interpreter keeps scalars as arrays of one element, and makes a loop's bound of one by
    int(), which numpy no longer allows. It prepares the language anew in every call of a function
    from a kernel, where once in a launch will do.
    """
    if interpreter._patch_lang is not _patch_lang:
        _patch_lang_tensor.patch = interpreter._patch_lang_tensor
        interpreter._patch_lang_tensor = _patch_lang_tensor
        _patch_lang.patch, _patch_lang.scope = (
            interpreter._patch_lang,
            interpreter._LangPatchScope(),
        )
        interpreter._patch_lang = _patch_lang


def _patch_lang_tensor(tensor, scope) -> None:
    _patch_lang_tensor.patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patch_lang(function):
    if _patch_lang.scope._changes:  # a kernel runs, and `function` is called from it
        return _patch_lang.scope
    every_language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    _patch_lang.scope = _patch_lang.patch(every_language)
    return _patch_lang.scope
