"""What the operators are to reach: forward and backward, float32, two threads."""

from dataclasses import dataclass

from benchmarks.shapes import Attention, Memory, Reports, Shape, Similarity

GATHER_OR_MASK = ("eager", "eager_masked")


@dataclass(frozen=True)
class Goal:
    """The least ratio of times, baseline to ours, against the fastest of `against`.

    None: measured for comparison, with no goal.
    """

    operator: str
    shape: Shape
    against: tuple[str, ...]
    at_least: float | None


def _attention(length: int, padded: float, unpadded: float) -> list[Goal]:
    against = ("sdpa", "eager")
    return [
        Goal("masked_attention", Attention(32, length), against, padded),
        Goal("masked_attention", Attention(32, length, padded=False), against, unpadded),
    ]


def _similarity(shape: Similarity, loop: float) -> list[Goal]:
    return [
        Goal("token_patch_similarity", shape, ("field",), loop),
        Goal("token_patch_similarity", shape, ("eager", "eager_context"), 1.3),
        Goal("token_patch_max_similarity", shape, ("eager", "eager_indexed"), 2.5),
    ]


GOALS = (
    Goal("memory_attention", Memory(16, 50, 8, 64, 2048, 32), GATHER_OR_MASK, 5.0),
    Goal("memory_attention", Memory(16, 50, 8, 64, 2048, 32), ("eager_bag",), None),
    Goal("memory_attention", Memory(16, 50, 8, 64, 2048, None), ("sdpa", "sdpa_expanded"), 1.2),
    *_similarity(Similarity(32, 64, 196, 128), loop=1.8),
    *_similarity(Similarity(16, 64, 196, 768), loop=2.2),
    *_similarity(Similarity(32, 64, 49, 128), loop=2.5),
    *_attention(50, padded=1.3, unpadded=1.15),
    *_attention(128, padded=1.3, unpadded=1.15),
    *_attention(197, padded=1.15, unpadded=1.0),
    Goal("masked_attention_varlen", Reports(64), ("sdpa", "sdpa_loop"), 2.0),
)
