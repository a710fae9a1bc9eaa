"""The Triton kernels, as far as a machine without a GPU goes: interpreted, and compiled."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from operator_calls import CALLS, SIZES, operator_arguments, with_outputs

pytest.importorskip("triton", reason="Triton is for Linux")
from triton.runtime.jit import JITFunction

from mpma_ext.kernels import check, launch
from mpma_ext.kernels.compile import compile_case, specialised
from mpma_ext.kernels.launch import table
from mpma_ext.ops import triton_kernels

HERE = Path(__file__).parent
SCRIPT = HERE / "interpreted_triton.py"
KERNELS = Path(check.__file__).parent


@pytest.mark.parametrize("name", CALLS)
def test_the_interpreted_kernels_agree_with_the_definition(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name} torch.float32 agrees" in done.stdout


@pytest.mark.parametrize("family", check.STEMS)
def test_the_interpreted_kernels_pass_the_traps_of_the_compiled_ones(family):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command.append(str(HERE / f"test_{family}_kernels.py"))
    settings = {"MPMA_TEST_BACKEND": "triton", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-5000:]


# A model's sizes. Batches are odd: no kernel is compiled anew for another one.
MODEL = {"B": 3, "S": 197, "Sq": 197, "Sk": 197, "H": 12, "D": 64, "Nq": 591, "Nk": 591}
MODEL |= {"...": 591, "N": 2048, "Bt": 3, "T": 57, "Bi": 5, "P": 196}


@pytest.mark.parametrize(
    ("name", "sizes", "settings"),
    [
        *((name, {}, {}) for name in CALLS if name != "memory_attention"),
        *(("memory_attention", {}, {"topk": topk}) for topk in (0, 32)),
        ("token_patch_similarity", {"D": 768}, {}),  # with Gram matrices
        *((f"token_patch{form}similarity", {"T": 200}, {}) for form in ("_", "_max_")),
    ],
    ids=str,
)
def test_what_is_compiled_is_what_is_launched(name, sizes, settings, monkeypatch):
    """Launches on tensors without contents, which nothing could read on the way either."""
    launched = set()

    def record(kernel, *arguments, grid, warmup, num_warps, num_stages, **named):
        bound = kernel.signature.bind(*arguments, **named).arguments
        launched.add((kernel.__name__, repr(specialised(kernel, bound))))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(launch, "generation", lambda device: "sm90")
    programs = "mpma_ext.kernels.token_patch_similarity._programs"
    monkeypatch.setattr(programs, lambda device, scratch: 264)
    for axis, size in (MODEL | sizes).items():
        monkeypatch.setitem(SIZES, axis, size)
    call = replace(CALLS[name], settings=CALLS[name].settings | settings)
    monkeypatch.setitem(CALLS, name, call)
    arguments = [
        value.to("meta", torch.bfloat16 if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for value in operator_arguments(name)
    ]
    outputs = triton_kernels.launcher(name)(*arguments)
    backward = with_outputs(name, arguments, outputs, lambda number: True)
    triton_kernels.launcher(f"{name}_backward")(*backward)
    family = next(family for family, stem in check.STEMS.items() if name.startswith(stem))
    compiled = {
        (case.kernel.__name__, repr(specialised(case.kernel, case.arguments)))
        for case in check.cases(family).values()
        if case.generation == "sm90"
    }
    assert launched and launched <= compiled


@pytest.mark.parametrize(
    "kernels", ["masked_attention", "memory_attention", "token_patch_max_similarity"]
)
def test_a_forward_kernel_compiles_for_a_gpu_that_is_not_here(kernels):
    module = importlib.import_module(f"mpma_ext.kernels.{kernels}")
    on_hopper = (case for case in module.compile_cases() if case.generation == "sm90")
    case = next(case for case in on_hopper if "bfloat16" in case.name and case.uses_dot)
    row = compile_case(case)
    assert row["spills"] == 0 and row["fits"] and "wgmma" in row["tensor_cores"]
    assert 0 < row["registers"] <= 255 and row["hash"] == case.digest()


@pytest.mark.parametrize("family", ["masked_attention", "memory_attention", "similarity"])
def test_tf32_is_used_where_pytorch_allows_it(family):
    """By the setting of PyTorch 2.9, after which its older `allow_tf32` raises when read."""
    precision = importlib.import_module(f"mpma_ext.kernels.{family}_tiles").precision
    operand, exact = ([torch.empty(0)], "ieee") if family == "similarity" else ([], "tf32x3")
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        for setting, expected in (("ieee", exact), ("tf32", "tf32")):
            products.fp32_precision = setting
            assert precision(*operand) == expected
    finally:
        products.fp32_precision = before


def test_faults_of_compiled_kernels_are_found(tmp_path, monkeypatch):
    """What `make check-triton` does, on one kernel."""
    key = ("masked_attention._forward bfloat16 64x64", "sm80")
    case = check.cases("masked_attention")[key]
    for cases in ("cases", "_cases"):
        monkeypatch.setattr(check, cases, lambda stem: {key: case})
    run = partial(check.check, "masked_attention", tmp_path, jobs=1)
    assert run(anew=False) == [
        f"{tmp_path / 'masked_attention.csv'} is not there: --write makes it"
    ]
    assert run(anew=True) == run(anew=False) == []
    (tmp_path / "masked_attention.csv").write_text(
        (tmp_path / "masked_attention.csv").read_text().replace(case.digest(), "0" * 16)
    )
    (wrong,) = run(anew=False)
    assert "is not as in" in wrong

    good = {"spills": "0", "shared": "1024", "tensor_cores": "wgmma"}
    on_hopper = replace(case, generation="sm90", name="kernel bfloat16")
    assert check.broken(on_hopper, good) == []
    for bad in ({"spills": "8"}, {"shared": str(228 << 10)}, {"tensor_cores": "mma.sync"}):
        assert len(check.broken(on_hopper, good | bad)) == 1
    assert len(check.broken(on_hopper, good | {"tensor_cores": ""})) == 2


@pytest.mark.parametrize("family", check.STEMS)
def test_every_kernel_of_the_launch_tables_is_compiled(family):
    launched = {kernel for stem in tables(family) for kernel in table(stem)}
    compiled = {name.split()[0].split(".")[1] for name, _ in check.cases(family)}
    assert compiled == launched


def tables(family):
    """The launch tables of a family's files."""
    found = KERNELS.glob(f"{check.STEMS[family]}*.json")
    return [path.stem for path in found]
