"""What csrc/cuda/*.cu do with PyTorch's tensors: the traps of the glue, on CPU tensors, emulated.

Checks, copies, strides, workspaces and empty operands. What it computes is the other tests' matter.
"""

import pytest
import torch
from emulated_traps import check_traps
from emulation import can_emulate

TRAPS = {
    "masked_attention": "strides or expanded or needed or packed or offsets or empty or sequences",
    "memory_attention": "strides or expanded or needed or no_rows or dropout_draws",
    "token_patch_similarity": "strides or expanded or wanted or empty_sizes or without_masks",
}


@pytest.mark.parametrize("family", TRAPS)
def test_traps(family):
    check_traps(f"test_{family}_kernels.py", "-k", TRAPS[family], glue=True)


def test_as_much_shared_memory_as_hopper_has(monkeypatch):
    """More keys a block in the backward of masked attention than what every device has room for."""
    monkeypatch.setenv("MPMA_EMULATED_SHARED_MEMORY", str(227 * 1024))
    chosen = "accurate and several and bfloat16"
    check_traps("test_masked_attention_kernels.py", "-k", chosen, glue=True)


# The operands' shapes, and what else a forward is given.
FORWARDS = {
    "masked_attention": ([(1, 20, 2, 64)] * 3, (None, 0.125, 0.0, None)),
    "memory_attention": ([(20, 2, 64), (40, 2, 64), (40, 2, 64)], (8, 0.125, 0.0, None)),
    "token_patch_similarity": ([(2, 9, 64), (2, 20, 64)], (None, None, 4.0, 5.0)),
    "token_patch_max_similarity": ([(2, 9, 64), (2, 20, 64)], (None, None)),
}


@pytest.mark.skipif(can_emulate() is not None, reason=can_emulate() or "")
@pytest.mark.parametrize("name", FORWARDS)
def test_rows_that_begin_between_vectors(name, monkeypatch):
    """A copy would not align them: they are contiguous, one element beyond 16 bytes."""
    monkeypatch.setenv("MPMA_EMULATED_GLUE", "1")
    from emulated_ops import operator

    shapes, rest = FORWARDS[name]
    generator = torch.Generator().manual_seed(0)
    aligned = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    shifted = [x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in aligned]
    assert all(x.is_contiguous() and x.data_ptr() % 16 for x in shifted)
    results, expected = (operator(name)(*x, *rest) for x in (shifted, aligned))
    if isinstance(results, torch.Tensor):
        results, expected = [results], [expected]
    assert all(map(torch.equal, results, expected))
