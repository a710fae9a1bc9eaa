"""The emulator catches one planted fault of each kind, and lets the same kernel without it pass."""

import pytest
import torch
from emulation import EmulationError

# Case, and what the emulator says of its fault.
FAULTS = {
    "global_read_outside": "read of 4 bytes of global memory outside the allocations, at byte 512",
    "global_write_outside": "write of 4 bytes of global memory outside the allocations",
    "read_of_host_memory": "at no device address",
    "write_to_input": "that is an input",
    "output_read_before_written": "read of 4 bytes of global memory .* never written",
    "shared_outside": "outside the pieces",
    "shared_never_written": "read of 4 bytes of shared memory at byte 20 of .* never written",
    "more_shared_than_launched": "take 1040 bytes and the launch gives 1024",
    "misaligned_vector": "read of 16 bytes of global memory that is misaligned",
    "race_in_block": "race: ",
    "race_in_warp": "race: ",
    "overwritten_while_read": "race: ",
    "warp_barrier_for_a_block": "race: ",
    "shuffle_as_a_barrier": "race: ",
    "copy_not_waited_for": "asynchronous copy still writes",
    "copy_without_barrier": "race: |asynchronous copy still writes",
    "copy_onto_what_is_read": "race: ",
    "copy_never_waited_for": "ends before its asynchronous copies",
    "copy_from_outside": "read of 16 bytes of global memory outside",
    "barrier_not_by_all": "1 have ended, 127 wait at a barrier",
    "shuffle_not_by_all": "31 of warp 0 at shuffle_xor",
    "different_operations_of_a_warp": "shuffle_xor and ballot|ballot and shuffle_xor",
    "ldmatrix_misaligned": "read of 16 bytes of shared memory that is misaligned",
    "two_blocks_write": "that another block writes",
    "reads_another_block": "another block|never written",
    "atomics_and_reads": "race: ",
    "pieces_that_share_memory": "race: |never written",
}


@pytest.mark.parametrize("case", FAULTS)
def test_fault(emulate, case):
    device = emulate("faults")
    for seed in range(3):
        device.seed(seed)
        values = device.put(torch.arange(128, dtype=torch.int32))
        device.call(case, values, device.empty((128,), torch.int32), 0)
        with pytest.raises(EmulationError, match=FAULTS[case]) as error:
            device.call(case, values, device.empty((128,), torch.int32), 1)
        assert f"{case}_kernel" in str(error.value)
        assert "block (" in str(error.value)


def test_strides_and_red_zones(emulate):
    device = emulate("faults")
    whole = torch.arange(4 * 200, dtype=torch.int32).view(4, 200)
    values = device.put(whole[1:2, :127])  # 127 words: the case reads 128
    assert values.stride() == (200, 1)
    assert torch.equal(values, whole[1:2, :127])
    with pytest.raises(EmulationError, match="at byte 508 of one of 508"):
        device.call("global_read_outside", values, device.empty((128,), torch.int32), 0)
