"""Every baseline computes what the operators' definitions do, in float64, with its gradients."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks.baselines import BASELINES
from benchmarks.baselines.compiled import missing_compiler
from benchmarks.baselines.half_precision import in_bfloat16
from benchmarks.baselines.masked_attention import flex
from benchmarks.baselines.refusal import RefusalError
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


GPUS_ONLY = ("sdpa_cudnn", "sdpa_efficient", "varlen", "late_interaction", "flash_maxsim")


def on_cpu(operator):
    return [name for name in BASELINES[operator] if name not in ("compiled", "flex", *GPUS_ONLY)]


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


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention(masked):
    """The forward, not compiled: on a CPU it has no backward."""
    operands, _ = random_operands("float64", "cpu", query=(3, 7, 2, 5), key=(3, 9, 2, 5))
    query, key = (x.detach() for x in operands.values())
    mask = prefixes(9, 4, 1) if masked else None
    expected = reference.masked_attention(query, key, key, key_padding_mask=mask)
    torch.testing.assert_close(flex(query, key, key, key_padding_mask=mask), expected, **CLOSE)


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_efficient"])
def test_a_kernel_that_cannot_serve_says_so(name):
    query = torch.randn(2, 4, 1, 8)
    with pytest.raises(RefusalError, match="_ATTENTION: No "):
        BASELINES["masked_attention"][name](query, query, query)


def test_packed_rows_are_given_to_varlen_attn(monkeypatch):
    """Both forms, through a kernel that is right: the definition."""
    module = ModuleType("varlen")
    module.varlen_attn = reference.masked_attention_varlen
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    size, other = (3, 7, 2, 5), (3, 9, 2, 5)
    assert_close(both("masked_attention", "varlen", {}, size, query=size, key=other, value=other))
    starts = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    packing = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    packing |= {"max_seqlen_q": 4, "max_seqlen_k": 4}
    rows = dict.fromkeys(("query", "key", "value"), (7, 2, 5))
    assert_close(both("masked_attention_varlen", "varlen", packing, (7, 2, 5), **rows))
    with pytest.raises(RefusalError, match="packed"):
        attend = BASELINES["masked_attention"]["varlen"]
        attend(*[torch.ones(size)] * 3, key_padding_mask=prefixes(7, 4, 1))


def summed_maxima(queries, documents, query_mask, document_mask):
    """What the peers compute: for every query and document the sum of the rows' maxima."""
    scores = torch.einsum("qld,nmd->qnlm", queries, documents)
    if document_mask is not None:
        scores = scores.masked_fill(~document_mask[None, :, None], -torch.inf)
    best = scores.amax(3)
    return (best if query_mask is None else best * query_mask[:, None]).sum(2)


def late_interaction():
    module = ModuleType("late_interaction_kernels")
    module.maxsim = lambda *operands, backward: summed_maxima(*operands)
    return module


def flash_maxsim():
    def mask(features, lengths):
        return None if lengths is None else torch.arange(features.shape[1]) < lengths[:, None]

    def score(queries, documents, doc_lengths, query_lengths):
        masks = mask(queries, query_lengths), mask(documents, doc_lengths)
        return summed_maxima(queries, documents, *masks)

    module = ModuleType("flash_maxsim")
    module.flash_maxsim_batched_train = score
    return module


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("peer", [late_interaction, flash_maxsim])
def test_peers_are_called_for_both_directions(peer, masked, monkeypatch):
    module = peer()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    mask = {"token_mask": prefixes(5, 2, 4) if masked else None}
    sizes = {"tokens": (3, 5, 6), "patches": (2, 7, 6)}
    gradients = [(3, 2)] * 2
    assert_close(both("token_patch_max_similarity", peer.__name__, mask, *gradients, **sizes))


@pytest.mark.parametrize("peer", [late_interaction, flash_maxsim])
def test_a_peer_that_is_not_installed_says_so(peer, monkeypatch):
    module = peer().__name__
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RefusalError, match=f"{module} is not installed"):
        score = BASELINES["token_patch_max_similarity"][peer.__name__]
        score(torch.ones(1, 2, 3), torch.ones(1, 2, 3))


def test_float32_is_given_to_half_precision_kernels_as_bfloat16():
    given = in_bfloat16(lambda *operands, **named: (*operands, *named.values()))
    x = torch.ones(2)
    dtypes = [o.dtype for o in given(x, x.double(), x.bool(), a=x, b=x.half())]
    assert dtypes == [torch.bfloat16, torch.float64, torch.bool, torch.bfloat16, torch.float16]
    assert given(None, a=3) == (None, 3)
