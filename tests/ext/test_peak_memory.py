"""What the compiled CPU kernels take of memory at their peak, forward and backward."""

import math

import pytest
import torch

import mpma_ext
from benchmarks.peak_memory import peak_extra_bytes

FLOAT = 4
# Copies and packed forms of every operand and gradient, and at most 8 gradients of one query.
COPIES = 12
# Of a thread: gradients of scores of four images, 4 MB each, that the similarity holds; the others
# have a block of scores for a second-level cache.
WORKSPACE = 18 << 20

# operator: operands, keywords, elements of what may never be in memory
CALLS = {
    "masked_attention": (((2, 2048, 4, 16),) * 3, {}, 2 * 4 * 2048 * 2048),
    "masked_attention dropout": (
        ((2, 2048, 4, 16),) * 3,
        {"dropout_p": 0.2, "dropout_seed": 1},
        2 * 4 * 2048 * 2048,
    ),
    "masked_attention_qkvpacked": (((2, 2048, 3, 4, 16),), {}, 2 * 4 * 2048 * 2048),
    "masked_attention_varlen": (
        ((4096, 4, 16),) * 3,
        {
            "cu_seqlens_q": torch.tensor([0, 2048, 4096], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 2048, 4096], dtype=torch.int32),
            "max_seqlen_q": 2048,
            "max_seqlen_k": 2048,
        },
        2 * 4 * 2048 * 2048,
    ),
    "memory_attention": (((6000, 1, 16), *((8000, 1, 16),) * 2), {}, 6000 * 8000),
    # The K chosen values of every row are as large as the scores here.
    "memory_attention topk": (
        ((16000, 1, 64), *((2048, 1, 64),) * 2),
        {"topk": 64},
        16000 * 64 * 64,
    ),
    "token_patch_similarity": (((96, 64, 32), (96, 196, 32)), {}, 96 * 96 * 64 * 196),
    "token_patch_similarity wide": (((96, 64, 8), (96, 196, 8)), {}, 96 * 96 * 64 * 196),
    "token_patch_max_similarity": (((96, 64, 32), (96, 196, 32)), {}, 96 * 96 * 64 * 196),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(name, operands, keywords):
    leaves = [t.requires_grad_() for t in operands]
    results = getattr(mpma_ext, name.split()[0])(*leaves, **keywords, backend="cpu")
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])


@pytest.mark.skipif(
    peak_extra_bytes(lambda: None, "cpu") is None, reason="the platform does not tell"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_the_size_of_all_scores(name, dtype):
    shapes, keywords, forbidden = CALLS[name]
    # What is loaded once, and the threads: packed offsets lead out of so few rows, and are kept in.
    train(
        name,
        [torch.randn(1, *shape[1:]).to(dtype) for shape in shapes],
        {k: v for k, v in keywords.items() if k != "topk"},
    )
    operands = [torch.randn(shape).to(dtype) for shape in shapes]
    allowed = COPIES * FLOAT * sum(math.prod(shape) for shape in shapes)
    allowed += WORKSPACE
    assert 2 * allowed < FLOAT * forbidden, "the case cannot tell"
    assert peak_extra_bytes(lambda: train(name, operands, keywords), "cpu") < allowed


@pytest.mark.skipif(
    peak_extra_bytes(lambda: None, "cpu") is None, reason="the platform does not tell"
)
def test_gradients_of_a_query_take_a_quarter_of_its_scores():
    """Beside them six of the query (results, gradients, copies by head) and six of the bank."""
    rows, heads, slots, width = 6400, 4, 2048, 128
    shapes = [(rows, heads, width), (slots, heads, width), (slots, heads, width)]
    train("memory_attention", [torch.randn(1, heads, width) for _ in shapes], {})
    operands = [torch.randn(shape) for shape in shapes]
    peak = peak_extra_bytes(lambda: train("memory_attention", operands, {}), "cpu")
    assert peak < FLOAT * heads * (rows * slots / 4 + 6 * rows * width + 6 * slots * width)
