"""How kernels are launched: block sizes, warps, stages, from a table beside each operator's file.

`<stem>.json` holds {kernel: {generation: {dtype: {bucket: launch}}}}, where a launch has the names
of the kernel's constexpr block sizes, and num_warps and num_stages. The table is read, never tuned
behind the caller's back. A generation without rows of its own takes its elder's.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Shared memory a block may have, in bytes, and whose rows a generation takes where it has none.
SHARED_MEMORY = {"sm80": 163 << 10, "sm86": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10}
ELDER = {"sm100": "sm90", "sm90": "sm80", "sm80": "sm86"}
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

# Lists that are told of every launch; of all threads, as autograd runs backwards in its own.
_listening: list[list[tuple[str, str, str, str, str]]] = []


@functools.cache
def table(stem: str) -> dict:
    """The launch table of an operator family."""
    return json.loads(Path(__file__).with_name(f"{stem}.json").read_text())


@functools.cache
def generation(device: torch.device) -> str:
    """Whose rows a device takes: sm86 stands for all with 99 KB of shared memory a block."""
    if device.type == "cpu":  # the interpreter
        return "sm86"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm80"
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm86")


def tf32_allowed() -> bool:
    """Whether PyTorch lets float32 products lose bits.

    `allow_tf32` would tell as well, but raises where that was said by the newer settings.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def launch(stem: str, kernel: str, tensor: torch.Tensor, bucket: str) -> dict[str, int]:
    """Keywords of a kernel's launch for operands such as `tensor`.

    float16 takes bfloat16's rows where it has none.

    Raises:
        KeyError: the table has no row for this bucket.
    """
    asked = generation(tensor.device), DTYPES[tensor.dtype], bucket
    for listener in _listening:
        listener.append((stem, kernel, *asked))
    return find(table(stem)[kernel], *asked)


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, str, str, str]]]:
    """Within this context, every launch's stem, kernel, generation, dtype and bucket."""
    listener: list[tuple[str, str, str, str, str]] = []
    _listening.append(listener)
    try:
        yield listener
    finally:
        _listening.remove(listener)


def find(rows: dict, name: str, dtype: str, bucket: str) -> dict[str, int]:
    """The row of a generation, or of the nearest elder one that has it."""
    dtypes = (dtype, "bfloat16") if dtype == "float16" else (dtype,)
    while True:
        for of_dtype in (rows.get(name, {}).get(d, {}) for d in dtypes):
            if bucket in of_dtype:
                return of_dtype[bucket]
        if name not in ELDER:
            raise KeyError(f"no launch of {bucket} in {dtype} for {name}")
        name = ELDER[name]
