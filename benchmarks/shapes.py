"""Sizes of the operators' operands, and the cases that are measured at them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FORWARD, TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class Attention:
    """Self-attention of (batch, length, heads, width); padded: lengths uniform in [S/2, S]."""

    batch: int
    length: int
    heads: int = 12
    width: int = 64
    padded: bool = True

    def __str__(self) -> str:
        padding = "padded" if self.padded else "unpadded"
        return f"B{self.batch} S{self.length} H{self.heads} D{self.width} {padding}"


@dataclass(frozen=True)
class Reports:
    """Packed reports of real lengths, attending to themselves or to `patches` of their image."""

    reports: int
    heads: int = 12
    width: int = 64
    patches: int | None = None

    def __str__(self) -> str:
        keys = "" if self.patches is None else f" to P{self.patches}"
        return f"{self.reports} reports H{self.heads} D{self.width}{keys}"


@dataclass(frozen=True)
class Memory:
    """Rows of (batch, length, heads, width) and a bank of `slots`; topk None keeps all."""

    batch: int
    length: int
    heads: int
    width: int
    slots: int
    topk: int | None

    def __str__(self) -> str:
        kept = "dense" if self.topk is None else f"topk={self.topk}"
        rows = f"B{self.batch} L{self.length} H{self.heads} D{self.width}"
        return f"{rows} N{self.slots} {kept}"


@dataclass(frozen=True)
class Similarity:
    """`batch` reports of `tokens` and images of `patches`; padded: lengths uniform in [T/2, T]."""

    batch: int
    tokens: int
    patches: int
    width: int
    padded: bool = False

    def __str__(self) -> str:
        padding = " padded" if self.padded else ""
        return f"B{self.batch} T{self.tokens} P{self.patches} D{self.width}{padding}"


@dataclass(frozen=True)
class Step:
    """One optimiser step of a preset of mpma_train on `batch` pairs; `vocabulary` in tokens."""

    preset: str
    batch: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.preset} B{self.batch}"


Shape = Attention | Reports | Memory | Similarity | Step


@dataclass(frozen=True)
class Case:
    """One comparison: an operator against one baseline.

    Attributes:
        operator: its public name, or "training_step".
        dtype: name of a torch dtype.
        mode: "forward" or "forward+backward", the latter timed as one thing.
        baseline: a name in `benchmarks.baselines.BASELINES[operator]`.
    """

    operator: str
    shape: Shape
    dtype: str
    mode: str
    baseline: str

    def __str__(self) -> str:
        shape = str(self.shape).replace(" ", "_")
        return f"{shape}-{self.dtype}-{self.mode}-{self.baseline}"


def every(
    operator: str,
    shapes: Sequence[Shape],
    baselines: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = (TRAINING,),
) -> Iterator[Case]:
    """All combinations, the baselines of one measurement beside each other."""
    for shape, dtype, mode, baseline in itertools.product(shapes, dtypes, modes, baselines):
        yield Case(operator, shape, dtype, mode, baseline)
