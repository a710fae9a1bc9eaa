"""Floating-point operations that a result needs: a multiplication and an addition are two.

Only matrix products count, each once and over real entries alone: neither what a kernel computes
again in its backward nor what it computes for padding. A share of the GEMM rate drawn from them is
thus of useful work.
"""


def attention(query_key_pairs: int, heads: int, width: int, *, backward: bool) -> int:
    """Attention over `query_key_pairs` = Σ over samples of queries · real keys.

    Forward: scores and output, 2 · 2·H·D each pair. Backward: gradients of weights and values, of
    queries and keys, twice as much.
    """
    return (3 if backward else 1) * 4 * query_key_pairs * heads * width


def memory(
    rows: int, heads: int, width: int, slots: int, topk: int | None, *, backward: bool
) -> int:
    """Attention of R rows to N slots, of which K are kept.

    Forward: R·H·D · 2 · (N scores + K weighted values). Backward: the four gradients, over kept
    slots only, R·H·D · 2 · 4K.
    """
    kept = slots if topk is None else min(topk, slots)
    products = slots + kept + (4 * kept if backward else 0)
    return 2 * rows * heads * width * products


def similarity(tokens: int, images: int, patches: int, width: int, *, backward: bool) -> int:
    """Softmax similarity of `tokens` real tokens with every image.

    Scores take u = 2·tokens·images·P·D; the attended patch, or its norm by the Gram matrix, takes
    u · min(1, P/D) more. The backward takes twice the forward. Gram matrices themselves, P/tokens
    of that, are left out.
    """
    scores = 2 * tokens * images * patches * width
    norms = 2 * tokens * images * patches * min(width, patches)
    return (3 if backward else 1) * (scores + norms)


def max_similarity(
    reports: int, tokens: int, images: int, patches: int, width: int, *, backward: bool
) -> int:
    """Max similarity of `tokens` real tokens of all reports together with every image.

    Forward: 2·tokens·images·P·D. Backward: every maximum, tokens·images + reports·images·P of them,
    adds a vector of D to a token's gradient and one to a patch's.
    """
    forward = 2 * tokens * images * patches * width
    maxima = tokens * images + reports * images * patches
    return forward + (4 * maxima * width if backward else 0)
