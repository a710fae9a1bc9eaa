"""The CUDA operators' library as Python sees it: what needs no GPU and no PyTorch for CUDA."""

import importlib.machinery
import importlib.util
import re
import subprocess

import pytest
from compile_check import PYTHON, ROOT, SETUP, find_nvcc

import mpma_ext

CUDA = ROOT / "csrc" / "cuda"
NAME = "mpma_ext._C_cuda"


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_the_library_is_a_module(tmp_path):
    """Without its kernels: the import finds the function that Python looks for in it."""
    library = tmp_path / "_C_cuda.abi3.so"
    flags = [*SETUP["NVCC_FLAGS"], "-DPy_LIMITED_API=0x030A0000", "-Xcompiler", "-fPIC", "-shared"]
    command = [find_nvcc(), *flags, f"-I{PYTHON}", CUDA / "module.cu", "-o", library]
    subprocess.run(command, check=True)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(module)
    assert module.__doc__ == "MPMA's CUDA operators"


def test_every_operator_registers_its_kernels():
    registered = set()
    for source in CUDA.glob("*.cu"):
        registered |= set(re.findall(r'm\.impl\(\s*"(\w+)"', source.read_text()))
    forward = set(mpma_ext.backends.OPERATORS)
    assert registered == forward | {f"{name}_backward" for name in forward}
