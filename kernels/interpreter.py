"""Repairs Triton's interpreter, which runs kernels on the CPU where TRITON_INTERPRET=1 is set."""

from types import SimpleNamespace

import numpy
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def repair() -> None:
    """Lets loops run to a kernel's arguments under numpy 2.4, and takes half the time.

    The interpreter keeps scalars as arrays of one element, and makes a loop's bound of one by
    int(), which numpy no longer allows. It prepares the language anew in every call of a function
    from a kernel, where once in a launch will do. bfloat16 it keeps as integers, multiplies as such
    and rounds towards zero.
    """
    if interpreter._patch_lang is not _patch_lang:
        _patch_lang_tensor.patch = interpreter._patch_lang_tensor
        interpreter._patch_lang_tensor = _patch_lang_tensor
        _patch_lang.patch, _patch_lang.scope = (
            interpreter._patch_lang,
            interpreter._LangPatchScope(),
        )
        interpreter._patch_lang = _patch_lang
        builder = interpreter.InterpreterBuilder
        _cast.others, builder.cast_impl = builder.cast_impl, _cast
        _dot.others, builder.create_dot = builder.create_dot, _dot


def _patch_lang_tensor(tensor, scope) -> None:
    _patch_lang_tensor.patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patch_lang(function):
    if _patch_lang.scope._changes:  # a kernel runs, and `function` is called from it
        return _patch_lang.scope
    every_language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    _patch_lang.scope = _patch_lang.patch(every_language)
    return _patch_lang.scope


def _cast(builder, handle, dtype):
    if (handle.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(numpy.array(handle.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    if (handle.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
        return _widened(handle)
    return _cast.others(builder, handle, dtype)


def _dot(builder, a, b, *others):
    return _dot.others(builder, _widened(a), _widened(b), *others)


def _widened(handle):
    """In float32 what is in bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = numpy.asarray(handle.data).astype(numpy.uint32) << 16
    return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)
