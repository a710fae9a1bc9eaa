"""The Triton kernels, as far as a machine without a GPU goes: interpreted, and compiled."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from operator_calls import CALLS

pytest.importorskip("triton", reason="Triton is for Linux")
from mpma_ext.kernels import check
from mpma_ext.kernels.compile import compile_case
from mpma_ext.kernels.launch import table

SCRIPT = Path(__file__).with_name("interpreted_triton.py")
KERNELS = Path(check.__file__).parent


@pytest.mark.parametrize("name", CALLS)
def test_the_interpreted_kernels_agree_with_the_definition(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name} torch.float32 agrees" in done.stdout


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


def test_faults_of_compiled_kernels_are_found(tmp_path, monkeypatch):
    """What `make check-triton` does, on one kernel."""
    key, case = next(
        item for item in check.cases("memory_attention").items() if "_dense" in item[0][0]
    )
    for cases in ("cases", "_cases"):
        monkeypatch.setattr(check, cases, lambda stem: {key: case})
    run = partial(check.check, "memory_attention", tmp_path, jobs=1)
    assert run(anew=False) == [
        f"{tmp_path / 'memory_attention.csv'} is not there: --write makes it"
    ]
    assert run(anew=True) == run(anew=False) == []
    (tmp_path / "memory_attention.csv").write_text(
        (tmp_path / "memory_attention.csv").read_text().replace(case.digest(), "0" * 16)
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
