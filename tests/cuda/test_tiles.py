"""The example product: tiles, fragments and asynchronous copies against a double product."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
# Whole blocks with aligned rows, and ragged edges with unaligned ones.
@pytest.mark.parametrize("shape", [(64, 128, 96), (67, 35, 51)])
def test_gemm(emulate, dtype, transposed, shape):
    device = emulate("example")
    m, n, k = shape
    torch.manual_seed(0)
    a = device.put(torch.randn(m, k).to(dtype))
    b = device.put(torch.randn(*((n, k) if transposed else (k, n))).to(dtype))
    expected = a.double() @ (b.double().T if transposed else b.double())
    results = []
    for seed in range(2):
        device.seed(seed)
        c = device.empty((m, n), torch.float32)
        name = f"gemm_{str(dtype).removeprefix('torch.')}{'_transposed' if transposed else ''}"
        device.call(name, a, b, c, m, n, k)
        results.append(c.clone())
    assert torch.equal(*results)  # whatever order the threads ran in
    assert (results[0] - expected).abs().max() < 2e-6 * expected.abs().max()
