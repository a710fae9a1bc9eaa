"""Floating-point operations in matrix products: a multiplication and an addition are two.

Padding does not count. A share of the GEMM rate drawn from `needed` is of useful work alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations of one call.

    Attributes:
        needed: each product that the result needs, once.
        done: with what a backward must compute again because no scores are kept. At the machine's
            GEMM rate, with nothing else to do, that is the least time a call can take.
    """

    needed: int
    done: int


def attention(query_key_pairs: int, heads: int, width: int, *, backward: bool) -> Work:
    """Attention over `query_key_pairs` = Σ over samples of queries · real keys.

    Forward: scores and output, 2 products. Backward: gradients of weights and values, of queries
    and keys, 4 products, and the scores again.
    """
    product = 2 * query_key_pairs * heads * width
    return Work(6 * product, 7 * product) if backward else Work(2 * product, 2 * product)


def memory(
    rows: int, heads: int, width: int, slots: int, topk: int | None, *, backward: bool
) -> Work:
    """Attention of R rows to N slots, of which K are kept.

    Forward: N scores and K weighted values a row. Backward: the four gradients, over kept slots
    only, and the kept scores again.
    """
    kept = slots if topk is None else min(topk, slots)
    row = 2 * heads * width * rows
    forward = row * (slots + kept)
    return (
        Work(forward + 4 * row * kept, forward + 5 * row * kept)
        if backward
        else Work(forward, forward)
    )


def similarity(tokens: int, images: int, patches: int, width: int, *, backward: bool) -> Work:
    """Softmax similarity of `tokens` real tokens with every image.

    Scores take u = 2·tokens·images·P·D. The norm of the attended patch takes u by its features, or
    half a product with the Gram matrix and half that matrix; the backward of the features 2 u, that
    of the Gram form the whole product, half of one and the rest of the matrix's. Of both ways the
    cheaper one is needed, and the kernel's own, by the Gram matrix up to P = 2 D, is done. The
    scores' own backward takes 2 u.
    """
    scores = 2 * tokens * images * patches * width
    gram, matrix = 2 * tokens * images * patches**2, images * patches**2 * width
    context = (scores, scores, 2 * scores)  # forward, the forward again, gradients
    by_gram = (gram // 2 + matrix, gram + matrix, gram // 2 + 2 * matrix)
    cheaper = min(scores, gram // 2 + matrix)
    own = by_gram if patches <= 2 * width else context
    if not backward:
        return Work(scores + cheaper, scores + own[0])
    least = min(3 * scores, 3 * gram // 2 + 3 * matrix)
    return Work(3 * scores + least, 4 * scores + sum(own))


def max_similarity(
    reports: int, tokens: int, images: int, patches: int, width: int, *, backward: bool
) -> Work:
    """Max similarity of `tokens` real tokens of all reports together with every image.

    Forward: 2·tokens·images·P·D. Backward: every maximum, tokens·images + reports·images·P of them,
    adds a vector of D to a token's gradient and one to a patch's.
    """
    forward = 2 * tokens * images * patches * width
    maxima = tokens * images + reports * images * patches
    work = forward + (4 * maxima * width if backward else 0)
    return Work(work, work)
