"""What nvcc makes of the kernels: reading its report, and the example against the table."""

import pytest
from compile_check import (
    COLUMNS,
    EXAMPLE,
    ROOT,
    TABLE,
    compile_source,
    faults,
    find_nvcc,
    parse,
    read,
)

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4mpma4cuda11some_kernelIfLi64EEEvPKf' for 'sm_80'
ptxas info    : Function properties for _ZN4mpma4cuda11some_kernelIfLi64EEEvPKf
    32 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 1024 bytes smem, 408 bytes cmem[0]
ptxas info    : Compile time = 155.083 ms
"""


def test_report():
    row = ("a.cu", "some_kernel<float,64>", "sm_80", "96", "32", "12", "1024", "13.0")
    assert parse("a.cu", REPORT, "13.0") == [dict(zip(COLUMNS, row, strict=True))]


def test_faults():
    spilling = parse("a.cu", REPORT, "13.0")
    clean = [{**spilling[0], "spills": "0"}]
    assert faults(clean, clean) == []
    assert "spills 12 bytes" in faults(spilling, spilling)[0]
    assert "not in the table" in faults(clean, [])[0]
    assert "nowhere else" in faults([], clean)[0]
    assert "registers is 96, in the table 90" in faults(clean, [{**clean[0], "registers": "90"}])[0]
    assert faults(clean, [{**clean[0], "registers": "90", "nvcc": "12.8"}]) == []


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_example():
    committed = [row for row in read(TABLE) if row["source"] == str(EXAMPLE.relative_to(ROOT))]
    assert faults(compile_source(EXAMPLE, find_nvcc()), committed) == []
