"""Every operator by backend="triton" against its definition, under Triton's interpreter.

Run by test_triton with TRITON_INTERPRET=1, which must be set before Triton is imported.
"""

import sys

import torch
from accuracy import Sample, check
from operator_calls import operands, others

MASKED = {
    "key_padding_mask": ("key", "value"),
    "token_mask": ("tokens",),
    "patch_mask": ("patches",),
}


def sample(name, dtype):
    """The operator's one call, with what its masks hide."""
    rest = others(name)
    floating = {key: x.float() for key, x in operands(name, dtype).items()}
    hidden = {
        operand: ~rest[mask]
        for mask, hides in MASKED.items()
        for operand in hides
        if mask in rest and operand in floating
    }
    return Sample(name, floating, rest, hidden)


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    # The softmax form makes weights in half precision, for tensor cores. Its result is float32, and
    # would be held to the definition's digits.
    half = [] if name == "token_patch_similarity" else [torch.bfloat16, torch.float16]
    for dtype in (torch.float32, *half):
        call = sample(name, dtype)
        layouts = ["transposed"] * len(call.operands)
        generator = torch.Generator().manual_seed(0)
        wanted = list(call.operands)
        check(generator, call, dtype, wanted, layouts, backend="triton")
        print(name, dtype, "agrees")
