"""Every operator by backend="triton" against its definition, under Triton's interpreter.

Run by test_triton with TRITON_INTERPRET=1, which must be set before Triton is imported.
"""

import sys

import torch
from operator_calls import CALLS, operands, run

# Sums of tens of float32 products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def results(name, backend):
    """Outputs, then the gradients of all operands."""
    leaves = {key: x.requires_grad_() for key, x in operands(name).items()}
    outputs = run(name, leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return [x.detach() for x in outputs] + list(gradients)


def check(name):
    pairs = zip(results(name, "triton"), results(name, "reference"), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, **CLOSE)
    print(name, "agrees", flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or CALLS:
        check(each)
