"""The compiled CPU kernels on random sizes, strides, masks and dtypes, against the definition.

Thousands of examples in a usual run, 10,000 an operator by `make fuzz`. Where a choice hangs on
which of two numbers is larger, operands are small integers: products are exact in every dtype, and
ties are many.
"""

import pytest
import torch
from accuracy import Sample, check
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mpma_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around the widths of the kernels' vectors (4, 8, 16) and tiles (24, 48, 96, 128, 256).
SHORT = st.one_of(st.integers(0, 20), st.sampled_from([23, 24, 25, 48, 50, 63, 64, 65]))
LONG = st.one_of(SHORT, st.sampled_from([95, 97, 127, 128, 129, 197, 255, 257]))
WIDTH = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 100, 128]))
FEW = st.integers(0, 3)
MAGNITUDE = st.sampled_from([0.1, 1.0, 4.0])


def numbers(draw, generator, shape, dtype, integers=False) -> Tensor:
    """Random operands in float32 that `dtype` holds exactly."""
    if integers:
        return torch.randint(-3, 4, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator) * draw(MAGNITUDE)
    return values.to(dtype).float()


def mask(draw, generator, batch, length) -> Tensor | None:
    """None, or True for what is real: a random share of it, none of it at times."""
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]))
    if share is None:
        return None
    return torch.rand(batch, length, generator=generator) < share


def check_drawn(draw, generator, sample: Sample, dtype) -> None:
    """`check` with any of the gradients wanted and any layouts."""
    layouts = st.sampled_from(["contiguous", "transposed", "sliced", "inner"])
    wanted = [name for name in sample.operands if draw(st.booleans())]
    check(generator, sample, dtype, wanted, [draw(layouts) for _ in sample.operands])


def dropout(draw) -> dict:
    return draw(st.sampled_from([{}, {"dropout_p": 0.3, "dropout_seed": -5}, {"dropout_p": 0.0}]))


def scale(draw) -> dict:
    return draw(st.sampled_from([{}, {"scale": 0.5}, {"scale": -1.5}]))


@st.composite
def generators(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_masked_attention(data, generator, dtype):
    draw = data.draw
    batch, heads, width, queries, keys = map(draw, (FEW, FEW, WIDTH, LONG, LONG))
    shown = mask(draw, generator, batch, keys)
    shapes = {"query": queries, "key": keys, "value": keys}
    sample = Sample(
        "masked_attention",
        {
            name: numbers(draw, generator, (batch, length, heads, width), dtype)
            for name, length in shapes.items()
        },
        {"key_padding_mask": shown, **dropout(draw), **scale(draw)},
    )
    if shown is not None:
        sample.poisoned = {"key": ~shown, "value": ~shown}
    check_drawn(draw, generator, sample, dtype)


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_masked_attention_varlen(data, generator, dtype):
    draw = data.draw
    heads, width = draw(FEW), draw(WIDTH)
    lengths = draw(st.lists(st.tuples(SHORT, SHORT), max_size=4))
    ends = torch.tensor([(0, 0), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    beyond = draw(st.integers(0, 2))  # rows after the last sequence
    queries, keys = (int(n) + beyond for n in ends[-1])
    shapes = {"query": queries, "key": keys, "value": keys}
    sample = Sample(
        "masked_attention_varlen",
        {
            name: numbers(draw, generator, (length, heads, width), dtype)
            for name, length in shapes.items()
        },
        {
            "cu_seqlens_q": ends[:, 0].contiguous(),
            "cu_seqlens_k": ends[:, 1].contiguous(),
            "max_seqlen_q": max((q for q, _ in lengths), default=0),
            "max_seqlen_k": max((k for _, k in lengths), default=0),
            **dropout(draw),
            **scale(draw),
        },
    )
    check_drawn(draw, generator, sample, dtype)


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_memory_attention(data, generator, dtype):
    draw = data.draw
    rows, heads, width = draw(LONG), draw(FEW), draw(WIDTH)
    slots = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 300, 2049])))
    topk = draw(st.one_of(st.none(), st.integers(1, slots + 1)))
    exact = topk is not None and topk < slots
    sample = Sample(
        "memory_attention",
        {
            "query": numbers(draw, generator, (rows, heads, width), dtype, integers=exact),
            "memory_key": numbers(draw, generator, (slots, heads, width), dtype, integers=exact),
            "memory_value": numbers(draw, generator, (slots, heads, width), dtype),
        },
        # A power of two keeps exact products exact.
        {"topk": topk, **dropout(draw), "scale": draw(st.sampled_from([0.125, -0.5]))},
        integers=("query", "memory_key") if exact else (),
    )
    check_drawn(draw, generator, sample, dtype)


def similarity(draw, generator, function: str, dtype, integers: bool) -> Sample:
    reports, images = draw(FEW), draw(FEW)
    tokens, patches = draw(SHORT), draw(LONG)
    # Of width 1 every cosine is 1 or -1, and all there is of its gradient is what did not cancel.
    width = draw(WIDTH.filter(lambda n: integers or n > 1))
    real = {
        "tokens": mask(draw, generator, reports, tokens),
        "patches": mask(draw, generator, images, patches),
    }
    shapes = {"tokens": (reports, tokens, width), "patches": (images, patches, width)}
    return Sample(
        function,
        {
            name: numbers(draw, generator, shape, dtype, integers=integers)
            for name, shape in shapes.items()
        },
        {"token_mask": real["tokens"], "patch_mask": real["patches"]},
        {name: ~m for name, m in real.items() if m is not None},
        ("tokens", "patches") if integers else (),
    )


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_token_patch_similarity(data, generator, dtype):
    sample = similarity(data.draw, generator, "token_patch_similarity", dtype, integers=False)
    temperatures = st.sampled_from([(4.0, 5.0), (-2.0, 0.5), (8.0, 1.0), (60.0, 1.0)])
    attention, pooling = data.draw(temperatures)
    sample.rest |= {"attention_temperature": attention, "pooling_temperature": pooling}
    check_drawn(data.draw, generator, sample, dtype)


@pytest.mark.parametrize("seed", range(20))
def test_attended_patches_are_not_rounded(seed):
    """Of more than 2 D patches no Gram matrix is formed: c itself enters the scores' gradients."""
    generator = torch.Generator().manual_seed(seed)
    operands = {
        "tokens": torch.randn(1, 3, 3, generator=generator).bfloat16().float(),
        "patches": torch.randn(1, 23, 3, generator=generator).bfloat16().float(),
    }
    sample = Sample("token_patch_similarity", operands, {"attention_temperature": 60.0})
    check(generator, sample, torch.bfloat16, list(operands), ["contiguous"] * 2)


@given(st.data(), generators(), st.sampled_from(DTYPES))
def test_token_patch_max_similarity(data, generator, dtype):
    sample = similarity(data.draw, generator, "token_patch_max_similarity", dtype, integers=True)
    check_drawn(data.draw, generator, sample, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_wrong_gradient_is_found(dtype, factor, name, monkeypatch):
    right = mpma_ext.masked_attention

    def wrong(**arguments):
        exact = arguments[name]
        arguments[name] = exact.detach() + factor * (exact - exact.detach())
        return right(**arguments)

    generator = torch.Generator().manual_seed(0)
    shape = (1, 64, 2, 64)
    operands = {n: torch.randn(shape, generator=generator) for n in ("query", "key", "value")}
    sample = Sample("masked_attention", {n: t.to(dtype).float() for n, t in operands.items()})
    check(generator, sample, dtype, list(operands), ["contiguous"] * 3)
    monkeypatch.setattr(mpma_ext, "masked_attention", wrong)
    with pytest.raises(AssertionError, match=">"):
        check(generator, sample, dtype, list(operands), ["contiguous"] * 3)
