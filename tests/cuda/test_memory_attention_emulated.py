"""The CUDA kernels of memory attention, run by the emulator over the traps of tests/ext."""

from emulated_traps import check_traps


def test_traps():
    check_traps("test_memory_attention_kernels.py")


def test_every_device_has_the_shared_memory(emulate):
    assert emulate("memory_attention").library.most_shared_bytes() <= 99 * 1024
