"""Runs an operator's CUDA kernels on the CPU: see emulator/emulator.h for what is checked."""

import ctypes
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulation"

INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{HERE / 'emulator'}", f"-I{HERE}"]
COMMON = ["-std=c++17", "-DMPMA_EMULATE", "-fPIC", "-Wall", "-Werror", "-g1", *INCLUDES]
MACHINE = ["-O3", *COMMON]
# Every load and store becomes a call that the emulator defines; calls of memset would hide some.
KERNELS = [
    *("-O2", "-fsanitize=thread", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fno-tree-loop-distribute-patterns", "-fno-threadsafe-statics", *COMMON),
]

INPUT, UNWRITTEN, WRITTEN = range(3)


class EmulationError(AssertionError):
    """What a kernel did wrong, or a launch that was refused."""


def can_emulate() -> str | None:
    """None, or why kernels cannot be emulated here."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulator needs Linux on x86-64"
    return None if shutil.which("g++") else "no g++"


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _build(target: Path, command: Sequence[object]) -> Path:
    """Runs `command -o target` unless the target is there; other processes may do the same."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}{target.suffix}")
        made = subprocess.run(
            [*map(str, command), "-o", str(scratch)], capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(f"{target.name} does not compile:\n{made.stderr}")
        os.replace(scratch, target)
    return target


def compile_emulated(
    source: Path, name: str = "", flags: Sequence[str] = (), libraries: Sequence[str] = ()
) -> Path:
    """The shared library of a C++ file that defines launchers, and the emulator.

    Args:
        name: of the library, where that is not the source's.
        flags, libraries: what the file wants beside the usual.
    """
    options, name = [*KERNELS, *flags], name or source.stem
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    parts = [ROOT / "csrc/cuda/element.h", *sorted((HERE / "emulator").iterdir())]
    machine = CACHE / f"emulator-{_digest(version, MACHINE, *(p.read_text() for p in parts))}.o"
    _build(machine, ["g++", *MACHINE, "-c", HERE / "emulator" / "emulator.cpp"])
    # The preprocessed text changes with the files that are included, and with no others.
    text = subprocess.run(["g++", *options, "-E", str(source)], capture_output=True, text=True)
    if text.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{text.stderr}")
    key = _digest(options, text.stdout, machine.name)
    kernels = _build(CACHE / f"{name}-{key}.o", ["g++", *options, "-c", source])
    # No -fsanitize=thread here: the emulator takes the place of its library.
    link = ["g++", "-shared", "-Wl,-Bsymbolic,--no-undefined", kernels, machine, *libraries]
    return _build(CACHE / f"{name}-{key}.so", link)


def compile_glue(family: str) -> Path:
    """The same of a family's .cu files, which register operators of torch.ops.mpma_emulated."""
    sources = {"": f"cuda/{family}.cu"}
    for path in (ROOT / "csrc" / "cuda").glob(f"{family}_*float*.cu"):
        sources[path.stem.removeprefix(family).upper()] = f"cuda/{path.name}"
    flags = [f'-DMPMA_GLUE{kind}="{path}"' for kind, path in sources.items()]
    flags += ["-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in include_paths()]
    folder = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return compile_emulated(HERE / "glue_emulated.cpp", f"{family}_glue", flags, libraries)


class EmulatedDevice:
    """A machine with an operator's kernels, and its global memory as ordinary CPU tensors."""

    def __init__(self, library: Path):
        self._path = library
        self.library = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
        self.library.mpma_emulator_allocate.restype = ctypes.c_void_p

    def _allocate(self, count: int, dtype: torch.dtype, kind: int) -> torch.Tensor:
        size = count * dtype.itemsize
        at = self.library.mpma_emulator_allocate(ctypes.c_int64(size), ctypes.c_int(kind))
        if at is None:
            raise MemoryError(f"the emulated memory has no room for {size} bytes")
        if count == 0:
            self.library.mpma_emulator_free(ctypes.c_void_p(at))
            return torch.empty(0, dtype=dtype)
        buffer = (ctypes.c_char * size).from_address(at)
        weakref.finalize(buffer, self.library.mpma_emulator_free, ctypes.c_void_p(at))
        return torch.frombuffer(buffer, dtype=dtype)

    def put(self, tensor: torch.Tensor, *, written: bool = False) -> torch.Tensor:
        """A copy with the same strides that kernels may read, and only with `written` write.

        The elements between a view's, which belong to nobody, stay outside: only the span from the
        view's first to its last element is there.
        """
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if tensor.numel() == 0:
            return torch.empty_like(tensor)
        memory = self._allocate(span, tensor.dtype, WRITTEN if written else INPUT)
        memory.copy_(tensor.detach().as_strided((span,), (1,)))
        return memory.as_strided(tensor.shape, tensor.stride())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that kernels must write before they read it; it holds NaN."""
        return self._allocate(math.prod(shape), dtype, UNWRITTEN).view(*shape)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that kernels may read and write."""
        return self._allocate(math.prod(shape), dtype, WRITTEN).view(*shape).zero_()

    def seed(self, seed: int) -> None:
        """Draws the order of threads and blocks anew."""
        self.library.mpma_emulator_seed(ctypes.c_uint64(seed))

    def call(self, function: str, *arguments: torch.Tensor | int | float | None) -> None:
        """Calls a launcher: tensors and None become pointers, numbers int64_t and double."""
        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        error = call(*map(_argument, arguments))
        if error is not None:
            raise EmulationError(re.sub(r"\[at (0x\w+)\]", self._source_lines, error.decode()))

    def _source_lines(self, place: re.Match) -> str:
        """The source lines of an address in the library, innermost first, if addr2line is there."""
        if not shutil.which("addr2line"):
            return place[0]
        # One before the address that a call returns to.
        command = ["addr2line", "-i", "-e", str(self._path), hex(int(place[1], 16) - 1)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        return "\n  at " + "\n  in ".join(line.replace(f"{ROOT}/", "") for line in lines if line)


def _argument(x: torch.Tensor | int | float | None) -> object:
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)
