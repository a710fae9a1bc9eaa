from collections.abc import Callable
from functools import cache

import pytest
from emulation import HERE, EmulatedDevice, can_emulate, compile_emulated


@cache
def _device(name: str) -> EmulatedDevice:
    return EmulatedDevice(compile_emulated(HERE / f"{name}_emulated.cpp"))


@pytest.fixture
def emulate() -> Callable[[str], EmulatedDevice]:
    """emulate("<op>") is a machine with the launchers of tests/cuda/<op>_emulated.cpp."""
    reason = can_emulate()
    if reason:
        pytest.skip(reason)

    def start(name: str) -> EmulatedDevice:
        device = _device(name)
        device.seed(0)
        return device

    return start
