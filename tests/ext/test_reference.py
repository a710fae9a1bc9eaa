"""The definitions against the formulas written out entry by entry, and their derivatives."""

import math
import sys

import pytest
import torch

from mpma_ext import reference
from mpma_ext.reference.memory_attention import best_slots
from mpma_ext.reference.philox import philox_4x32, seed_tensor, seed_words

F64 = torch.float64
# Two sums of the same float64 terms in another order: a few hundred roundings at most.
EXACT = 1e-13


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).requires_grad_()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), *key)
    assert tuple(int(word) for word in words) == expected


def test_seed_words_cover_negative_seeds():
    low, high = seed_words(seed_tensor(-1, torch.device("cpu")))
    assert (int(low), int(high)) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert int(seed_tensor(2**63 + 5, torch.device("cpu"))) == -(2**63) + 5


def attention_by_hand(query, key, value, attend, scale):
    output = torch.zeros_like(query)
    for b in range(query.shape[0]):
        real = [j for j in range(key.shape[1]) if attend[b, j]]
        for i in range(query.shape[1]):
            for h in range(query.shape[2]):
                if real:
                    scores = torch.stack([scale * query[b, i, h] @ key[b, j, h] for j in real])
                    weights = scores.exp() / scores.exp().sum()
                    output[b, i, h] = sum(
                        w * value[b, j, h] for w, j in zip(weights, real, strict=True)
                    )
    return output


MASK = torch.tensor([[True, False, True, True], [False] * 4])


def test_masked_attention_by_hand():
    query, key, value = leaf(2, 3, 2, 5), leaf(2, 4, 2, 5, seed=1), leaf(2, 4, 2, 5, seed=2)
    output = reference.masked_attention(query, key, value, key_padding_mask=MASK, scale=0.3)
    torch.testing.assert_close(
        output, attention_by_hand(query, key, value, MASK, 0.3), atol=EXACT, rtol=EXACT
    )


def test_dropout_follows_the_counter():
    query, key = leaf(2, 3, 2, 5).detach(), leaf(2, 6, 2, 5).detach()
    value = torch.eye(6, dtype=F64)[None, :, None].expand(2, 6, 2, 6)
    p, seed = 0.4, 123456789012345678
    # Values are unit vectors: the output is the row of weights itself.
    args = (torch.nn.functional.pad(query, (0, 1)), torch.nn.functional.pad(key, (0, 1)), value)
    full = reference.masked_attention(*args)
    got = reference.masked_attention(*args, dropout_p=p, dropout_seed=seed)
    for b in range(2):
        for i in range(3):
            for h in range(2):
                for j in range(6):
                    counter = tuple(torch.tensor([c]) for c in (j // 4, i, h, b))
                    words = philox_4x32(counter, seed % 2**32, seed >> 32)
                    dropped = int(words[j % 4]) < math.floor(p * 2**32)
                    expected = 0 if dropped else full[b, i, h, j] / (1 - p)
                    assert abs(float(got[b, i, h, j] - expected)) < EXACT


@pytest.mark.parametrize("topk", [1, 3, None])
def test_memory_attention_by_hand(topk):
    query, key, value = leaf(2, 3, 2, 5), leaf(7, 2, 5, seed=1), leaf(7, 2, 5, seed=2)
    output = reference.memory_attention(query, key, value, topk=topk)
    for b in range(2):
        for i in range(3):
            for h in range(2):
                scores = (key[:, h] @ query[b, i, h] * 5**-0.5).detach()
                order = sorted(range(7), key=lambda n: (-float(scores[n]), n))[: topk or 7]
                weights = scores[order].exp() / scores[order].exp().sum()
                torch.testing.assert_close(
                    output[b, i, h], weights @ value[order, h], atol=EXACT, rtol=EXACT
                )


def test_equal_scores_go_to_the_lower_slot():
    scores = torch.tensor([[[0.0, 2.0, -0.0, 2.0, 0.0, 2.0]]])
    assert best_slots(scores, 2).tolist() == [[[1, 3]]]
    assert best_slots(scores, 4).tolist() == [[[0, 1, 3, 5]]]
    assert best_slots(scores, 5).tolist() == [[[0, 1, 2, 3, 5]]]


TOKEN_MASK = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
PATCH_MASK = torch.tensor([[True] * 5 + [False], [True] * 6, [False] * 6])


def similarity_by_hand(tokens, patches, t1, t2):
    out = torch.zeros(len(tokens), len(patches), dtype=F64)
    for j, report in enumerate(tokens):
        for i, image in enumerate(patches):
            w, v = report[TOKEN_MASK[j]], image[PATCH_MASK[i]]
            if len(w) and len(v):
                a = (w @ v.T).softmax(0)
                c = (t1 * a).softmax(1) @ v
                cosine = torch.nn.functional.cosine_similarity(w, c)
                out[j, i] = (t2 * cosine).exp().sum().log()
    return out


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_token_patch_similarity_by_hand(chunk, monkeypatch):
    # The function hides the module of the same name from an attribute path.
    module = sys.modules["mpma_ext.reference.token_patch_similarity"]
    monkeypatch.setattr(module, "CHUNK_SCORES", chunk)
    tokens, patches = leaf(3, 4, 5), leaf(3, 6, 5, seed=1)
    got = reference.token_patch_similarity(
        tokens,
        patches,
        token_mask=TOKEN_MASK,
        patch_mask=PATCH_MASK,
        attention_temperature=3.0,
        pooling_temperature=2.0,
    )
    expected = similarity_by_hand(tokens, patches, 3.0, 2.0)
    torch.testing.assert_close(got, expected, atol=EXACT, rtol=EXACT)
    weights = torch.arange(9.0, dtype=F64).view(3, 3) + 1
    got_gradients = torch.autograd.grad((got * weights).sum(), (tokens, patches))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (tokens, patches))
    torch.testing.assert_close(got_gradients, expected_gradients, atol=1e-12, rtol=1e-12)


def test_token_patch_max_similarity_by_hand():
    tokens, patches = leaf(3, 4, 5), leaf(3, 6, 5, seed=1)
    to_patches, to_tokens = reference.token_patch_max_similarity(
        tokens, patches, token_mask=TOKEN_MASK, patch_mask=PATCH_MASK
    )
    for j in range(3):
        for i in range(3):
            scores = tokens[j][TOKEN_MASK[j]] @ patches[i][PATCH_MASK[i]].T
            expected = (0, 0)
            if scores.numel():
                expected = (scores.amax(1).mean(), scores.amax(0).mean())
            assert abs(float(to_patches[j, i] - expected[0])) < EXACT
            assert abs(float(to_tokens[j, i] - expected[1])) < EXACT


def test_max_similarity_gives_the_gradient_to_the_first_of_equals():
    tokens = torch.ones(1, 2, 3, dtype=F64, requires_grad=True)
    patches = torch.ones(1, 4, 3, dtype=F64, requires_grad=True)
    to_patches, _ = reference.token_patch_max_similarity(tokens, patches)
    to_patches.sum().backward()
    assert patches.grad.sum(2).tolist() == [[3.0, 0.0, 0.0, 0.0]]
    tokens.grad = None
    _, to_tokens = reference.token_patch_max_similarity(tokens, patches)
    to_tokens.sum().backward()
    assert tokens.grad.sum(2).tolist() == [[3.0, 0.0]]


CU_Q, CU_K = (torch.tensor(c, dtype=torch.int32) for c in ([0, 3, 3, 5], [0, 2, 4, 4]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_packed_equals_padded(dropout_p):
    query, key, value = leaf(6, 2, 5), leaf(4, 2, 5, seed=1), leaf(4, 2, 5, seed=2)
    dropout = {"dropout_p": dropout_p, "dropout_seed": 11}
    packed = reference.masked_attention_varlen(query, key, value, CU_Q, CU_K, 3, 9, **dropout)
    padded_q, padded_k, padded_v = (torch.zeros(3, n, 2, 5, dtype=F64) for n in (3, 2, 2))
    attend = torch.zeros(3, 2, dtype=torch.bool)
    for b in range(3):
        q, k = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        padded_q[b, : q.stop - q.start] = query[q].detach()
        padded_k[b, : k.stop - k.start], padded_v[b, : k.stop - k.start] = key[k], value[k]
        attend[b, : k.stop - k.start] = True
    padded = reference.masked_attention(
        padded_q, padded_k, padded_v, key_padding_mask=attend, **dropout
    )
    for b in range(3):
        torch.testing.assert_close(
            packed[CU_Q[b] : CU_Q[b + 1]], padded[b, : CU_Q[b + 1] - CU_Q[b]]
        )
    assert packed[5].abs().max() == 0  # the row after the last sequence
    assert packed[3:5].abs().max() == 0  # the third sequence has no keys


CALLS = {
    "masked_attention": lambda q, k, v: reference.masked_attention(
        q, k, v, key_padding_mask=MASK, dropout_p=0.3, dropout_seed=3
    ),
    "masked_attention_qkvpacked": lambda qkv: reference.masked_attention_qkvpacked(
        qkv, key_padding_mask=MASK[:, :3]
    ),
    "masked_attention_varlen": lambda q, k, v: reference.masked_attention_varlen(
        q, k, v, CU_Q, CU_K, 3, 2, dropout_p=0.3, dropout_seed=3
    ),
    "memory_attention": lambda q, k, v: reference.memory_attention(
        q, k, v, topk=3, dropout_p=0.3, dropout_seed=3
    ),
    "memory_attention_dense": reference.memory_attention,
    "token_patch_similarity": lambda w, v: reference.token_patch_similarity(
        w, v, token_mask=TOKEN_MASK, patch_mask=PATCH_MASK
    ),
    "token_patch_max_similarity": lambda w, v: reference.token_patch_max_similarity(
        w, v, token_mask=TOKEN_MASK, patch_mask=PATCH_MASK
    ),
}
SHAPES = {
    "masked_attention": ((2, 2, 2, 3), (2, 4, 2, 3), (2, 4, 2, 3)),
    "masked_attention_qkvpacked": ((2, 3, 3, 2, 5),),
    "masked_attention_varlen": ((6, 1, 3), (4, 1, 3), (4, 1, 3)),
    "memory_attention": ((3, 2, 3), (7, 2, 3), (7, 2, 3)),
    "memory_attention_dense": ((3, 2, 3), (4, 2, 3), (4, 2, 3)),
    "token_patch_similarity": ((3, 4, 5), (3, 6, 5)),
    "token_patch_max_similarity": ((3, 4, 5), (3, 6, 5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    leaves = [leaf(*shape, seed=n) for n, shape in enumerate(SHAPES[name])]
    assert torch.autograd.gradcheck(CALLS[name], leaves)
    assert torch.autograd.gradgradcheck(CALLS[name], leaves, atol=1e-4)


def test_what_is_masked_has_no_effect():
    query, key, value = leaf(2, 3, 2, 5), leaf(2, 4, 2, 5, seed=1), leaf(2, 4, 2, 5, seed=2)
    clean = reference.masked_attention(query, key, value, key_padding_mask=MASK)
    bad = [x.detach().masked_fill(~MASK[:, :, None, None], torch.nan) for x in (key, value)]
    bad[1][0, 1] = torch.inf
    bad = [x.requires_grad_() for x in bad]
    output = reference.masked_attention(query, *bad, key_padding_mask=MASK)
    assert torch.equal(output, clean)
    output.sum().backward()
    for x in bad:
        assert torch.equal(x.grad[~MASK], torch.zeros_like(x.grad[~MASK]))
    assert query.grad.isfinite().all() and query.grad[1].abs().max() == 0

    tokens, patches = leaf(3, 4, 5), leaf(3, 6, 5, seed=1)
    bad_tokens = tokens.detach().masked_fill(~TOKEN_MASK[..., None], torch.nan).requires_grad_()
    bad_patches = patches.detach().masked_fill(~PATCH_MASK[..., None], -torch.inf).requires_grad_()
    masks = {"token_mask": TOKEN_MASK, "patch_mask": PATCH_MASK}
    for function in (reference.token_patch_similarity, reference.token_patch_max_similarity):
        clean, output = (
            torch.stack(x) if isinstance(x, tuple) else x
            for x in (
                function(tokens, patches, **masks),
                function(bad_tokens, bad_patches, **masks),
            )
        )
        assert torch.equal(output, clean)
        gradients = torch.autograd.grad(output.sum(), (bad_tokens, bad_patches))
        for gradient, mask in zip(gradients, (TOKEN_MASK, PATCH_MASK), strict=True):
            assert gradient.isfinite().all()
            assert gradient[~mask].abs().max() == 0


def test_nan_in_a_query_row_stays_there():
    query, key, value = leaf(1, 3, 1, 4), leaf(1, 5, 1, 4, seed=1), leaf(1, 5, 1, 4, seed=2)
    with torch.no_grad():
        query[0, 1] = torch.nan
    output = reference.masked_attention(query, key, value)
    assert output[0, 1].isnan().all() and output[0, [0, 2]].isfinite().all()
    output.sum().backward()
    assert query.grad[0, 1].isnan().all() and query.grad[0, [0, 2]].isfinite().all()
    assert key.grad.isnan().any() and value.grad.isnan().any()


def test_reference_scores_in_float32_under_autocast():
    query, key, value = (leaf(2, 3, 2, 5).float() for _ in range(3))
    expected = reference.masked_attention(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.masked_attention(query, key, value), expected)
