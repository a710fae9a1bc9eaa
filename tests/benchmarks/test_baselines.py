"""Every baseline computes what the operators' definitions do, in float64, with its gradients."""

import pytest
import torch

from benchmarks.baselines import BASELINES
from benchmarks.baselines.compiled import missing_compiler
from benchmarks.problem import Problem, random_operands
from mpma_ext import reference

SIMILARITIES = ("token_patch_similarity", "token_patch_max_similarity")
# Sums of tens of products in another order: 1e-16 each, with a margin for the largest.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def prefixes(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def both(operator, name, settings, *gradient_sizes, **sizes):
    """Outputs and gradients of a baseline and of the definition."""
    operands, draw = random_operands("float64", "cpu", **sizes)
    gradients = tuple(draw(*size) for size in gradient_sizes)
    functions = (BASELINES[operator][name], getattr(reference, operator))
    return [Problem(f, operands | settings, gradients, backward=True)() for f in functions]


def assert_close(pair):
    for got, expected in zip(*pair, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def on_cpu(operator):
    return [name for name in BASELINES[operator] if name not in ("compiled", "sdpa_cudnn")]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", on_cpu("masked_attention"))
def test_masked_attention(name, masked):
    size = (3, 7, 2, 5)
    mask = {"key_padding_mask": prefixes(7, 4, 1) if masked else None}
    assert_close(both("masked_attention", name, mask, size, query=size, key=size, value=size))


def test_a_sample_at_a_time():
    size, real = (3, 7, 2, 5), prefixes(7, 4, 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    loop = BASELINES["masked_attention_varlen"]["sdpa_loop"](q, k, v, key_padding_mask=real)
    expected = reference.masked_attention(q, k, v, key_padding_mask=real)
    torch.testing.assert_close(loop[real], expected[real], **CLOSE)


BOTH, KEPT, DENSE = (None, 3), (3,), (None,)
MEMORY_FORMS = {
    "field": BOTH,
    "eager": BOTH,
    "eager_bag": KEPT,
    "eager_masked": KEPT,
    "sdpa": DENSE,
    "sdpa_expanded": DENSE,
}


@pytest.mark.parametrize(
    ("name", "topk"), [(name, topk) for name, kinds in MEMORY_FORMS.items() for topk in kinds]
)
def test_memory_attention(name, topk):
    assert MEMORY_FORMS.keys() == set(on_cpu("memory_attention"))
    size, bank = (2, 4, 2, 5), (9, 2, 5)
    sizes = {"query": size, "memory_key": bank, "memory_value": bank}
    assert_close(both("memory_attention", name, {"topk": topk}, size, **sizes))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("operator", "name"),
    [(operator, name) for operator in SIMILARITIES for name in on_cpu(operator)],
)
def test_similarities(operator, name, masked):
    mask = {"token_mask": prefixes(5, 2, 4) if masked else None}
    outputs = 1 if operator == "token_patch_similarity" else 2
    sizes = {"tokens": (3, 5, 6), "patches": (2, 7, 6)}
    assert_close(both(operator, name, mask, *[(3, 2)] * outputs, **sizes))


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize(
    "operator",
    [
        "masked_attention",
        "memory_attention",
        "token_patch_similarity",
        "token_patch_max_similarity",
    ],
)
def test_compiled_baselines(operator):
    size, bank = (2, 4, 1, 3), (5, 1, 3)
    if operator.startswith("token_patch"):
        outputs = 1 if operator == "token_patch_similarity" else 2
        mask = {"token_mask": prefixes(5, 2)}
        sizes = {"tokens": (2, 5, 6), "patches": (2, 7, 6)}
        assert_close(both(operator, "compiled", mask, *[(2, 2)] * outputs, **sizes))
    elif operator == "memory_attention":
        sizes = {"query": size, "memory_key": bank, "memory_value": bank}
        assert_close(both(operator, "compiled", {"topk": 3}, size, **sizes))
    else:
        mask = {"key_padding_mask": prefixes(4, 2)}
        assert_close(both(operator, "compiled", mask, size, query=size, key=size, value=size))
