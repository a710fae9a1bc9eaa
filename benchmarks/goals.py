"""What the operators are to reach.

`GOALS` on two threads of a CPU: forward and backward, float32. `DEVICE_GOALS` on a GPU (the
figures are meant for an H200), in bfloat16.
"""

from dataclasses import dataclass

from benchmarks.shapes import (
    FORWARD,
    TRAINING,
    Attention,
    Memory,
    Reports,
    Shape,
    Similarity,
)

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


# What a DeviceGoal measures, in words that follow the value. A ratio is the time of the fastest of
# `against` over ours.
RATIO = "as fast"
COPY_SHARE = "of the copy bandwidth"
GEMM_SHARE = "of the GEMM rate"
EXTRA_BYTES = "of extra memory"


@dataclass(frozen=True)
class DeviceGoal:
    """A bound on one measure of a kernel for GPUs: at least, but of extra bytes at most.

    Attributes:
        against: baselines, or a backend of ours.
        backends: whose goal it is.
    """

    operator: str
    shape: Shape
    measure: str
    bound: float
    against: tuple[str, ...] = ()
    mode: str = TRAINING
    backends: tuple[str, ...] = ("cuda", "triton")


FUSED = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "varlen", "flex")
EAGER_SOFTMAX = ("eager", "eager_context")
PEERS = ("late_interaction", "flash_maxsim")
ELEMENT = 2  # bytes, in bfloat16


def forward_bytes(shape: Attention) -> int:
    """What a forward has to read and write: query, key, value and output."""
    return 4 * ELEMENT * shape.batch * shape.length * shape.heads * shape.width


def memory_bytes(shape: Memory) -> int:
    """Inputs and outputs of forward and backward: rows, bank, output, and all their gradients."""
    rows = shape.batch * shape.length
    return 4 * ELEMENT * (rows + shape.slots) * shape.heads * shape.width


def similarity_bytes(shape: Similarity) -> int:
    """Results of forward and backward: gradients of tokens and patches; float32 similarities."""
    gradients = ELEMENT * shape.batch * (shape.tokens + shape.patches) * shape.width
    return gradients + 4 * shape.batch**2


def _attention_on_a_device(batch: int, length: int, copy_share: float) -> list[DeviceGoal]:
    what = ("masked_attention", Attention(batch, length, padded=False))
    return [
        DeviceGoal(*what, RATIO, 1.3, FUSED),
        DeviceGoal(*what, COPY_SHARE, copy_share, mode=FORWARD),
    ]


def _similarity_on_a_device(patches: int, width: int) -> list[DeviceGoal]:
    shape = Similarity(256, 64, patches, width)
    softmax, maximum = ("token_patch_similarity", shape), ("token_patch_max_similarity", shape)
    narrow = width <= 128
    bound = 256e6 + similarity_bytes(shape)  # a workspace of 256 MB
    return [
        *([DeviceGoal(*softmax, RATIO, 10.0, ("field",))] if narrow else []),
        DeviceGoal(*softmax, RATIO, 3.0, EAGER_SOFTMAX),
        *([] if narrow else [DeviceGoal(*softmax, GEMM_SHARE, 0.6)]),
        DeviceGoal(*softmax, EXTRA_BYTES, bound),
        DeviceGoal(*maximum, RATIO, 1.2 if narrow else 2.0, PEERS),
    ]


_BEST_SLOTS = ("memory_attention", Memory(128, 100, 12, 64, 2048, 32))
_OF_ALL = (
    *_attention_on_a_device(512, 50, 0.8),
    *_attention_on_a_device(256, 128, 0.8),
    *_attention_on_a_device(128, 197, 0.55),
    *_attention_on_a_device(96, 256, 0.55),
    DeviceGoal(*_BEST_SLOTS, RATIO, 8.0, ("eager",)),
    DeviceGoal(*_BEST_SLOTS, RATIO, 3.0, ("compiled",)),
    DeviceGoal(*_BEST_SLOTS, EXTRA_BYTES, memory_bytes(_BEST_SLOTS[1])),
    *(goal for d in (128, 768) for p in (49, 196) for goal in _similarity_on_a_device(p, d)),
)


def _beside_triton() -> list[DeviceGoal]:
    """CUDA is to be no slower than Triton, and to pay where Triton cannot select in registers."""
    places = dict.fromkeys((goal.operator, goal.shape) for goal in _OF_ALL)
    return [
        DeviceGoal(
            *place, RATIO, 1.5 if place == _BEST_SLOTS else 1.0, ("triton",), TRAINING, ("cuda",)
        )
        for place in places
    ]


DEVICE_GOALS = (*_OF_ALL, *_beside_triton())
