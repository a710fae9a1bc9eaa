"""Builds the compiled operators: mpma_ext._C (CPU) and, where CUDA can be built, mpma_ext._C_cuda.

Both use LibTorch's stable ABI (PyTorch 2.10 and later) and Python's limited API (3.11 and later),
so that one binary serves all those versions. Project metadata stands in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-Wall", "-g0", "-fvisibility=hidden"),
    # Fused multiply-adds, and loops over floats that need no errno and no trap to vectorise.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors wider than the baseline never cross a call: everything that takes one is inlined.
    "-Wno-psabi",
]
# USE_CUDA: the stable headers declare the current stream only with it.
NVCC_FLAGS = ["-O3", "-std=c++17", STABLE_ABI, "-DUSE_CUDA"]
CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=sm_100",
]


def sources(folder: str, pattern: str) -> list[str]:
    """Paths relative to the root, as setuptools wants them, in an order that never varies."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def choose_cuda(
    setting: str, cuda_sources: list[str], nvcc: str | None, torch_cuda: str | None
) -> tuple[bool, str]:
    """Whether to build the CUDA library, and why; RuntimeError if it is asked for and cannot be."""
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"MPMA_BUILD_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "MPMA_BUILD_CUDA=0"
    missing = [
        reason
        for absent, reason in (
            (not cuda_sources, "csrc/cuda holds no .cu file"),
            (nvcc is None, "nvcc is neither on PATH nor under CUDA_HOME"),
            (torch_cuda is None, f"torch {torch.__version__} is not a CUDA build"),
        )
        if absent
    ]
    if not missing:
        return True, f"nvcc is {nvcc} and torch is built for CUDA {torch_cuda}"
    if setting == "1":
        raise RuntimeError(f"MPMA_BUILD_CUDA=1, but {' and '.join(missing)}")
    return False, " and ".join(missing)


def find_nvcc() -> str | None:
    """The compiler that torch.utils.cpp_extension would use."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def cuda_libraries() -> list[str]:
    """Where nvcc links from: CUDA_HOME is a guess where nvcc on PATH is a link or a script."""
    command = [find_nvcc(), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', said)


def cuda_extension(cuda_sources: list[str]) -> CUDAExtension:
    """The CUDA operators: a library of its own, because it cannot be loaded beside a CPU torch."""
    extension = CUDAExtension(
        "mpma_ext._C_cuda",
        cuda_sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[*sources("csrc", "*.h"), *sources("csrc/cuda", "*.h")],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, STABLE_ABI],
            "nvcc": [*NVCC_FLAGS, *CUDA_ARCHITECTURES],
        },
        py_limited_api=True,
    )
    extension.library_dirs += cuda_libraries()
    extension.libraries = ["cudart_static" if x == "cudart" else x for x in extension.libraries]
    return extension


def extensions() -> list[CppExtension]:
    """_C always, _C_cuda where it can be built; prints what was chosen."""
    found = [
        CppExtension(
            "mpma_ext._C",
            [*sources("csrc", "*.cpp"), *sources("csrc/cpu", "*.cpp")],
            include_dirs=[str(ROOT / "csrc")],
            depends=[*sources("csrc", "*.h"), *sources("csrc/cpu", "*.h")],
            extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI]},
            py_limited_api=True,
        )
    ]
    cuda_sources = sources("csrc/cuda", "*.cu")
    build_cuda, why = choose_cuda(
        os.environ.get("MPMA_BUILD_CUDA", "auto"), cuda_sources, find_nvcc(), torch.version.cuda
    )
    print(f"mpma: CUDA operators {'are' if build_cuda else 'are not'} built: {why}", flush=True)
    return found + ([cuda_extension(cuda_sources)] if build_cuda else [])


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["mpma_ext", "mpma_ext.*", "mpma_train", "mpma_train.*"]),
            "mpma_ext.kernels",
        ],
        package_dir={"mpma_ext.kernels": "kernels"},
        package_data={"mpma_train": ["configs/*.yaml"], "mpma_ext.kernels": ["*.json"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
