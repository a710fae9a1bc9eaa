"""What setup.py decides and packs, and what the compiled library asks of its surroundings."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpma_ext._C
import mpma_ext.kernels

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(mpma_ext._C.__file__)


@pytest.fixture(scope="module")
def setup():
    """setup.py's functions: under another name than __main__ it builds nothing."""
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("setting", "cuda_sources", "nvcc", "torch_cuda", "built", "why"),
    [
        ("auto", ["a.cu"], "/usr/bin/nvcc", "13.0", True, "nvcc is /usr/bin/nvcc"),
        ("1", ["a.cu"], "/usr/bin/nvcc", "13.0", True, "built for CUDA 13.0"),
        ("0", ["a.cu"], "/usr/bin/nvcc", "13.0", False, "MPMA_BUILD_CUDA=0"),
        ("auto", [], "/usr/bin/nvcc", "13.0", False, "no .cu file"),
        ("auto", ["a.cu"], None, "13.0", False, "nvcc is neither"),
        ("auto", ["a.cu"], "/usr/bin/nvcc", None, False, "not a CUDA build"),
    ],
)
def test_choice_of_cuda(setup, setting, cuda_sources, nvcc, torch_cuda, built, why):
    chosen, reason = setup["choose_cuda"](setting, cuda_sources, nvcc, torch_cuda)
    assert chosen is built
    assert why in reason


@pytest.mark.parametrize(
    ("cuda_sources", "nvcc", "torch_cuda", "why"),
    [
        ([], "/usr/bin/nvcc", "13.0", "no .cu file"),
        (["a.cu"], None, "13.0", "nvcc is neither"),
        (["a.cu"], "/usr/bin/nvcc", None, "not a CUDA build"),
        ([], None, None, "no .cu file and nvcc is neither .* and torch .* is not a CUDA build"),
    ],
)
def test_cuda_that_is_asked_for_and_cannot_be(setup, cuda_sources, nvcc, torch_cuda, why):
    with pytest.raises(RuntimeError, match=f"MPMA_BUILD_CUDA=1, but .*{why}"):
        setup["choose_cuda"]("1", cuda_sources, nvcc, torch_cuda)


def test_unknown_setting(setup):
    with pytest.raises(ValueError, match="MPMA_BUILD_CUDA must be auto, 0 or 1, got 'yes'"):
        setup["choose_cuda"]("yes", [], None, None)


def test_packages(tmp_path):
    """A wheel's Python files: Triton kernels inside mpma_ext, presets beside the training code."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "-d", tmp_path],
        cwd=ROOT,
        env=os.environ | {"MPMA_BUILD_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    packed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.is_file()}
    sources = {f"mpma_ext/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    for package in ("mpma_ext", "mpma_train"):
        sources |= {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    presets = {f"mpma_train/configs/{p.name}" for p in ROOT.glob("mpma_train/configs/*.yaml")}
    assert presets and sources | presets <= packed
    assert not any(path.startswith(("kernels/", "tests/")) for path in packed)


def test_kernels_are_found_where_a_wheel_has_them():
    assert Path(mpma_ext.kernels.__file__).parent.name == "kernels"
    assert mpma_ext.kernels.__name__ == "mpma_ext.kernels"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is part of binutils")
def test_library_needs_only_the_stable_interfaces():
    """One binary for many versions: PyTorch's C functions and Python's limited API."""
    assert LIBRARY.name == "_C.abi3.so"
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    wanted = {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    assert not {name for name in wanted if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))}
    assert {name for name in wanted if name.startswith("Py")} <= {
        "PyModule_Create2",
        "PyUnicode_FromString",
    }


def test_symbolic_integers_take_plain_ones():
    """max_seqlen is a SymInt in the schema, an int from Python."""
    schema = torch.ops.mpma.masked_attention_varlen.default._schema
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    assert "SymInt" in str(schema) and kinds["max_seqlen_q"] == kinds["max_seqlen_k"]
    q = torch.randn(3, 1, 4)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    output, _ = torch.ops.mpma.masked_attention_varlen(
        q, q, q, bounds, bounds, 3, 3, 0.5, 0.0, None
    )
    assert output.shape == q.shape
