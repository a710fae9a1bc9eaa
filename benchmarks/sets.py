"""The sets of cases: which shapes, in which dtypes and modes, against which baselines."""

from collections.abc import Iterator

from benchmarks.goals import GATHER_OR_MASK, GOALS
from benchmarks.shapes import (
    FORWARD,
    TRAINING,
    Attention,
    Case,
    Memory,
    Reports,
    Similarity,
    Step,
    every,
)

DENSE = ("eager", "sdpa", "sdpa_expanded")
SPARSE = (*GATHER_OR_MASK, "eager_bag")
ATTENTIONS = ("masked_attention", "masked_attention_qkvpacked", "masked_attention_varlen")
SIMILARITIES = {
    "token_patch_similarity": ("field", "eager", "eager_context", "compiled"),
    "token_patch_max_similarity": ("eager", "eager_indexed", "compiled"),
}


def quick() -> Iterator[Case]:
    """Exactly what `GOALS` needs."""
    return _goals("float32")


def bfloat16() -> Iterator[Case]:
    """The same in bfloat16."""
    return _goals("bfloat16")


def model() -> Iterator[Case]:
    """The shapes of one training step of mpma_base and of tiny, and the step itself.

    mpma_base, 64 pairs: 49 of 196 patches visible (50 with [CLS]), all of them in the decoder.
    tiny, 64 pairs: 32 of 64 patches visible, 96 tokens at most.
    """
    both = {"dtypes": ("float32", "bfloat16"), "modes": (FORWARD, TRAINING)}
    images = (
        Attention(64, 50, padded=False),
        Attention(64, 197, padded=False),
        Attention(64, 33, 4, 32, padded=False),
        Attention(64, 65, 4, 24, padded=False),
    )
    attention = ("field", "eager", "compiled", "sdpa")
    yield from every("masked_attention", images, attention, **both)
    yield from every("masked_attention_qkvpacked", images[:1], attention, **both)
    # Whole and masked reports go through the text encoder together.
    reports = (
        Reports(128),
        Reports(64, patches=49),
        Reports(128, 4, 32),
        Reports(64, 4, 32, patches=32),
    )
    yield from every("masked_attention_varlen", reports, ("field", "eager", "sdpa"), **both)
    # The visible patches and, on average, about as many tokens of a report.
    memories = (Memory(64, 98, 12, 64, 2048, 32), Memory(64, 80, 4, 32, 256, 16))
    yield from every("memory_attention", memories, (*SPARSE, "compiled"), **both)
    similarities = (Similarity(64, 128, 49, 128, True), Similarity(64, 96, 32, 128, True))
    for operator, baselines in SIMILARITIES.items():
        yield from every(operator, similarities, baselines, **both)
    # A tokenizer trained on the synthetic set's reports has 814 tokens, BERT's has 30,522.
    steps = (Step("tiny", 64, 814), Step("mpma_base", 4, 30522))
    yield from every("training_step", steps, ("reference",))


def sweep() -> Iterator[Case]:
    """A wide grid against eager, on which nothing may be slower."""
    lengths = [Attention(8, s, padded=p) for s in (16, 77, 128, 256, 512) for p in (True, False)]
    widths = [Attention(8, 128, 8, d) for d in (16, 32, 80, 128)]
    sizes = [Attention(1, 50), Attention(256, 50, 4, 32), Attention(2, 1024, 8)]
    yield from every("masked_attention", lengths + widths + sizes, ("eager", "sdpa"))
    packed = [Attention(8, s, padded=p) for s in (50, 197) for p in (True, False)]
    yield from every("masked_attention_qkvpacked", packed, ("eager", "sdpa"))
    reports = [Reports(8), Reports(256, 4, 32), Reports(32, patches=196)]
    yield from every("masked_attention_varlen", reports, ("eager", "sdpa"))
    banks = [(n, k) for n in (64, 512, 2048, 8192) for k in (1, 8, 32, 64, None) if n != k]
    for slots, topk in banks:
        shape = Memory(8, 50, 8, 64, slots, topk)
        yield from every("memory_attention", [shape], DENSE if topk is None else SPARSE)
    narrow = [Memory(1, 50, 8, 64, 2048, 32), Memory(8, 50, 4, 16, 2048, 32)]
    wide = [Memory(8, 50, 4, 128, 2048, 32)]
    yield from every("memory_attention", narrow + wide, SPARSE)
    pairs = [(2, 64, 196), (8, 16, 49), (8, 128, 196), (8, 97, 361), (64, 16, 49)]
    similarities = [Similarity(b, t, p, d) for b, t, p in pairs for d in (64, 128, 512)]
    yield from every("token_patch_similarity", similarities, ("field", "eager", "eager_context"))
    yield from every("token_patch_max_similarity", similarities, ("eager", "eager_indexed"))


def gpu() -> Iterator[Case]:
    """What `DEVICE_GOALS` needs and what it is to be seen beside: shapes that fill the chip.

    What is compiled comes last in every operator, as it takes longest.
    """
    half = ("bfloat16",)
    images = [Attention(b, s, padded=False) for b, s in ((512, 50), (256, 128), (128, 197))]
    images.append(Attention(96, 256, padded=False))
    padded = [Attention(256, 128), Attention(128, 197)]
    kernels = ("sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "varlen")
    masking = ("eager", "sdpa", "sdpa_efficient", "sdpa_cudnn")
    yield from every("masked_attention", images, (*kernels, "eager"), half)
    yield from every("masked_attention", images, kernels, half, (FORWARD,))
    yield from every("masked_attention", padded, masking, half)
    yield from every("masked_attention", images + padded, ("flex", "compiled"), half)
    both = (FORWARD, TRAINING)
    yield from every("masked_attention_varlen", [Reports(256)], ("eager", "sdpa"), half, both)
    yield from every("masked_attention_varlen", [Reports(256)], ("varlen",), half, both)
    rows, bank = (128, 100, 12, 64), 2048
    best, dense = Memory(*rows, bank, 32), Memory(*rows, bank, None)
    yield from every("memory_attention", [best], (*GATHER_OR_MASK, "compiled"), half)
    yield from every("memory_attention", [dense], ("eager", "sdpa"), half)
    narrow, wide = ([Similarity(256, 64, p, d) for p in (49, 196)] for d in (128, 768))
    softmax = ("eager", "eager_context")
    yield from every("token_patch_similarity", narrow, ("field",), half)
    yield from every("token_patch_similarity", narrow + wide, softmax, half)
    yield from every("token_patch_similarity", narrow + wide, ("compiled",), half)
    maxima = ("eager", "eager_indexed", "late_interaction", "flash_maxsim")
    yield from every("token_patch_max_similarity", narrow + wide, maxima, half)
    yield from every("token_patch_max_similarity", narrow + wide, ("compiled",), half)


def smoke() -> Iterator[Case]:
    """Everything once, so small that it says nothing about speed: for the suite's own test."""
    both = {"dtypes": ("float32", "bfloat16")}
    for operator in ATTENTIONS:
        shape = Reports(3, 2, 8) if operator.endswith("varlen") else Attention(2, 9, 2, 8)
        yield from every(operator, [shape], ("field", "eager", "sdpa"), **both)
    sparse, dense = Memory(2, 5, 2, 8, 40, 4), Memory(2, 5, 2, 8, 40, None)
    yield from every("memory_attention", [sparse], ("field", *SPARSE), **both)
    yield from every("memory_attention", [dense], DENSE, modes=(FORWARD, TRAINING))
    for operator, (*baselines, _) in SIMILARITIES.items():
        yield from every(operator, [Similarity(2, 5, 7, 8, True)], baselines, **both)
    yield from every("training_step", [Step("tiny", 2, 200)], ("reference",))


SETS = {each.__name__: each for each in (quick, bfloat16, model, sweep, gpu, smoke)}


def _goals(dtype: str) -> Iterator[Case]:
    seen = set()
    for goal in GOALS:
        for case in every(goal.operator, [goal.shape], goal.against, (dtype,)):
            if case not in seen:
                seen.add(case)
                yield case
