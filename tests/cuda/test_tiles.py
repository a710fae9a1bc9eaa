"""Tiles, fragments and asynchronous copies against double products, and the machine's functions."""

import pytest
import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
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
        device.call(f"gemm_{name(dtype)}{'_transposed' if transposed else ''}", a, b, c, m, n, k)
        results.append(c.clone())
    assert torch.equal(*results)  # whatever order the threads ran in
    assert (results[0] - expected).abs().max() < 2e-6 * expected.abs().max()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("sign", [1, -1])
def test_tensor_cores_cut_off_what_has_no_room(emulate, sign):
    """Rounding to the nearest float32, 1 + 1.5 · 2^-24 would be 1 + 2^-23."""
    a, b = torch.zeros(64, 32), torch.zeros(32, 64)
    a[:, :2], b[0], b[1] = torch.tensor([1, 1.5 * 2**-12]), sign, sign * 2**-12
    device = emulate("example")
    c = device.empty((64, 64), torch.float32)
    operands = (device.put(a.bfloat16()), device.put(b.bfloat16()))
    device.call("gemm_bfloat16", *operands, c, 64, 64, 32)
    assert (c == sign).all()


@pytest.mark.parametrize("dtype", DTYPES)
# Everything, and an odd part of it: the rest must stay as it was.
@pytest.mark.parametrize("real", [(32, 64), (21, 33)])
def test_products(emulate, dtype, real):
    device = emulate("tiles")
    torch.manual_seed(0)
    q, k, v = (device.put(torch.randn(32, 64).to(dtype)) for _ in range(3))
    outputs = [device.zeros((32, 64), dtype) for _ in range(2)]
    maxima, sums = (device.empty((32,), torch.float32) for _ in range(2))
    device.call(f"products_{name(dtype)}", q, k, v, *outputs, maxima, sums, *real)
    scores = q.double() @ k.double().T
    torch.testing.assert_close(maxima.double(), scores.amax(1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums.double(), scores.sum(0), atol=1e-4, rtol=1e-5)
    rounded = scores.to(dtype).double()
    for got, expected in zip(outputs, (rounded @ v.double(), rounded.T @ v.double()), strict=True):
        kept = torch.zeros(32, 64, dtype=torch.float64)
        kept[: real[0], : real[1]] = expected[: real[0], : real[1]]
        # A score on the edge between two numbers of dtype may round the other way.
        allowed = 8 * torch.finfo(dtype).eps * expected.abs().max()
        assert (got.double() - kept).abs().max() < allowed
        assert not got[real[0] :].any() and not got[:, real[1] :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions(emulate, dtype):
    device = emulate("tiles")
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,)).to(torch.int32)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    # Any bits, every half, and what lies on and beside the middle between two bfloat16.
    middles = torch.randint(0, 0x7F7F, (512,), dtype=torch.int32) << 16 | 0x8000
    beside = torch.cat([middles - 1, middles, middles + 1]).view(torch.float32)
    x = torch.cat([bits.view(torch.float32), halves, (halves[1:] + halves[:-1]) / 2, beside])
    y, z = device.empty(x.shape, dtype), device.empty(x.shape, torch.float32)
    device.call(f"convert_{name(dtype)}", device.put(x), y, z, len(x))
    torch.testing.assert_close(y, x.to(dtype), atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(z, x.to(dtype).float(), atol=0, rtol=0, equal_nan=True)


def test_warp(emulate):
    device = emulate("tiles")
    out = device.empty((32, 8), torch.int64)
    device.call("warp", out)
    odd = 0xAAAAAAAA
    for lane, row in enumerate(out.tolist()):
        philox = device.library.philox_on_host(lane)
        bits = 16 + 100 * 1 + 10000 * 1
        votes = 1 + 10 * 0 + 100 * 1
        up = lane - 3 if lane >= 3 else lane
        expected = [lane ^ 5, 1 << 40 | 31 - lane, up, odd, bits, 0x55555555, votes]
        assert row == [*expected, philox & 0xFFFFFFFF]
