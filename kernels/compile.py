"""Compiles kernels for GPUs that are not there, and reads what came out.

Needs no GPU: Triton brings ptxas. What is compiled is what a launch would compile: Triton's own
binder looks at the arguments, since a kernel knows of an integer whether it is 1 or a multiple of
16, and of a pointer that it is aligned.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from mpma_ext.kernels.launch import SHARED_MEMORY


@dataclass(frozen=True)
class Case:
    """One kernel in one launch configuration.

    Attributes:
        name: unique; kernel, dtype and bucket.
        kernel: the jitted function.
        arguments: all of a launch's, by name, with the values that they have there; a torch dtype
            stands for an aligned tensor of it.
        generation: a key of SHARED_MEMORY.
        uses_dot: whether tensor-core instructions are to be found.
    """

    name: str
    kernel: triton.runtime.JITFunction
    arguments: Mapping[str, object]
    num_warps: int
    num_stages: int
    generation: str
    uses_dot: bool = True

    def digest(self) -> str:
        """Of the kernel's source and all that it calls, this configuration, Triton's version."""
        what = (self.kernel.cache_key, *specialised(self.kernel, self.arguments))
        what += (self.num_warps, self.num_stages, self.generation, triton.__version__)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def specialised(
    kernel: triton.runtime.JITFunction, arguments: Mapping[str, object]
) -> tuple[dict, dict, dict]:
    """What a kernel is compiled for: types, constants, and what is known of the other arguments."""
    backend = make_backend(GPUTarget("cuda", 90, 32))  # every GPU of this kind is told the same
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {name: MockTensor.wrap_dtype(value) for name, value in arguments.items()}
    bound, found, _ = bind(**arguments)
    return kernel._pack_args(backend, arguments, bound, found, {})[1:]


def compile_case(case: Case) -> dict[str, object]:
    """Registers a thread, bytes spilled, bytes of shared memory, and the tensor-core instructions.

    Raises:
        triton.CompilationError: the kernel does not compile for that generation.
    """
    source = ASTSource(case.kernel, *specialised(case.kernel, case.arguments))
    target = GPUTarget("cuda", int(case.generation.removeprefix("sm")), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    said = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = True  # what comes from a cache says nothing
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
    (registers,) = re.findall(r"Used (\d+) registers", said.getvalue())
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said.getvalue())
    shared = compiled.metadata.shared
    return {
        "hash": case.digest(),
        "registers": int(registers),
        "spills": sum(map(int, spilled)),
        "shared": shared,
        "fits": shared <= SHARED_MEMORY[case.generation],
        "tensor_cores": sorted(set(re.findall(r"wgmma|mma\.sync|tcgen05", compiled.asm["ptx"]))),
    }
