"""The CUDA kernels of masked attention in the tests of traps, on the emulated machine."""

from emulated_traps import check_traps


def test_traps():
    check_traps("test_masked_attention_kernels.py")
