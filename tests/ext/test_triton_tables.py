"""The committed tables of what the Triton kernels compile to, beside the kernels as they are."""

import random
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
from mpma_ext.kernels import check
from mpma_ext.kernels.launch import SHARED_MEMORY

TABLES = Path(__file__).parents[2] / "docs" / "kernels"
RECOMPILED = 5  # cases a family, about a second each; make check-triton compiles them all


@pytest.fixture(scope="module", params=check.STEMS)
def family(request):
    """Its name, its cases and its table, both by kernel and generation."""
    return request.param, check.cases(request.param), check.read(TABLES / f"{request.param}.csv")


def test_every_row_of_the_launch_tables_is_recorded_as_it_is(family):
    """A hash is of source, configuration and Triton's version: what changed has another one."""
    name, cases, table = family
    recorded = {key: row["hash"] for key, row in table.items()}
    changed = [key for key, case in cases.items() if recorded.get(key) != case.digest()]
    gone = [key for key in recorded if key not in cases]
    command = f"make check-triton CHECK_ARGS='{name} --write'"
    assert not changed and not gone, f"{changed + gone} differ: {command}"


def test_no_recorded_row_breaks_a_rule(family):
    _, cases, table = family
    assert {g for _, g in table} == set(SHARED_MEMORY)
    assert [f"{key} {rule}" for key in table for rule in check.broken(cases[key], table[key])] == []


def test_a_sample_compiles_to_what_is_recorded(family):
    _, cases, table = family
    halves = [key for key in sorted(cases) if "float32" not in key[0]]
    for key in random.Random(0).sample(halves, RECOMPILED):
        assert check.compiled_row(cases[key]) == table[key]
