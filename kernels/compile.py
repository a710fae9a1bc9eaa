"""Compiles kernels for GPUs that are not there, and reads what came out.

Needs no GPU: Triton brings ptxas and cuobjdump.
"""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpma_ext.kernels.launch import SHARED_MEMORY

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTER_ALIGNMENT = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """One kernel in one launch configuration.

    Attributes:
        name: unique; kernel, dtype and bucket.
        kernel: the jitted function.
        signature: Triton types of all arguments that are not constexpr, "*bf16", "i32", "fp32".
        constexprs: values of all others, block sizes included.
        generation: a key of SHARED_MEMORY.
        uses_dot: whether tensor-core instructions are to be found.
    """

    name: str
    kernel: triton.runtime.JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    generation: str
    uses_dot: bool = True

    def digest(self) -> str:
        """Of the kernel's source and all that it calls, this configuration, Triton's version."""
        what = (self.kernel.cache_key, sorted(self.signature.items()))
        what += (sorted(self.constexprs.items()), self.num_warps, self.num_stages)
        what += (self.generation, triton.__version__)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def compile_case(case: Case) -> dict[str, object]:
    """Registers a thread, bytes spilled, bytes of shared memory, and the tensor-core instructions.

    Raises:
        triton.CompilationError: the kernel does not compile for that generation.
    """
    names = case.kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in case.constexprs.items()}
    pointers = {(i,): _POINTER_ALIGNMENT for i, n in enumerate(names) if signature[n][0] == "*"}
    source = ASTSource(case.kernel, signature, constants, pointers)
    target = GPUTarget("cuda", int(case.generation.removeprefix("sm")), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    shared = compiled.metadata.shared
    return {
        "hash": case.digest(),
        **_assembled(compiled.asm["ptx"], case.generation),
        "shared": shared,
        "fits": shared <= SHARED_MEMORY[case.generation],
        "tensor_cores": sorted(set(re.findall(r"wgmma|mma\.sync|tcgen05", compiled.asm["ptx"]))),
    }


def _assembled(ptx: str, generation: str) -> dict[str, int]:
    """What ptxas says of registers and spills."""
    blackwell = generation == "sm100"
    tool = _TOOLS / ("ptxas-blackwell" if blackwell else "ptxas")
    arch = generation.replace("sm", "sm_") + ("a" if generation in ("sm90", "sm100") else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {"registers": int(registers), "spills": sum(map(int, spilled))}
