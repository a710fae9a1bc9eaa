"""One call of every form of every operator, forward and backward, small or of a model's size.

`python -m benchmarks.gpu.calls --backend cuda` makes the small ones: what compute-sanitizer runs.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

import mpma_ext
from benchmarks.lengths import padding_mask, prefix_mask, report_lengths
from benchmarks.problem import Problem, random_operands

DTYPES = ("bfloat16", "float32")
DROPOUT = {"dropout_p": 0.1, "dropout_seed": torch.tensor([5])}


@dataclass(frozen=True)
class Call:
    """Sizes of a call's floating operands and of its outputs, and what else it is given."""

    operator: str
    operands: dict[str, tuple[int, ...]]
    outputs: tuple[tuple[int, ...], ...]
    settings: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " ".join("×".join(map(str, size)) for size in self.operands.values())
        kept = f" topk={self.settings['topk']}" if "topk" in self.settings else ""
        return f"{self.operator} {sizes}{kept}"

    def problem(self, dtype: str, backend: str, device: str) -> Problem:
        """The call on random operands."""
        operands, draw = random_operands(dtype, device, **self.operands)
        if self.operator.startswith("token_patch"):
            for features in operands.values():  # products of unit variance: no weight is all
                features.data.mul_(features.shape[-1] ** -0.25)
        there = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in self.settings.items()
        }
        function = partial(getattr(mpma_ext, self.operator), backend=backend)
        gradients = tuple(draw(*size) for size in self.outputs)
        return Problem(function, operands | there, gradients, backward=True)


def attention(batch, queries, keys, heads, width) -> Call:
    query, key = (batch, queries, heads, width), (batch, keys, heads, width)
    operands = {"query": query, "key": key, "value": key}
    mask = {"key_padding_mask": padding_mask(batch, keys)}
    return Call("masked_attention", operands, (query,), mask | DROPOUT)


def packed_projection(batch, length, heads, width) -> Call:
    mask = {"key_padding_mask": padding_mask(batch, length)}
    operands = {"qkv": (batch, length, 3, heads, width)}
    output = (batch, length, heads, width)
    return Call("masked_attention_qkvpacked", operands, (output,), mask | DROPOUT)


def packed(lengths: Sequence[int], heads, width, beyond=0) -> Call:
    """Self-attention of packed sequences; `beyond` rows come after the last one."""
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    size = (sum(lengths) + beyond, heads, width)
    packing = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    packing |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    operands = dict.fromkeys(("query", "key", "value"), size)
    return Call("masked_attention_varlen", operands, (size,), packing | DROPOUT)


def memory(rows, heads, width, slots, topk) -> Call:
    query, bank = (rows, heads, width), (slots, heads, width)
    operands = {"query": query, "memory_key": bank, "memory_value": bank}
    return Call("memory_attention", operands, (query,), {"topk": topk} | DROPOUT)


def similarities(reports, tokens, images, patches, width) -> list[Call]:
    operands = {"tokens": (reports, tokens, width), "patches": (images, patches, width)}
    lengths = torch.arange(images) % 2 + patches - 1
    masks = {
        "token_mask": padding_mask(reports, tokens),
        "patch_mask": prefix_mask(lengths, patches),
    }
    output = (reports, images)
    return [
        Call("token_patch_similarity", operands, (output,), masks),
        Call("token_patch_max_similarity", operands, (output, output), masks),
    ]


# Several tiles and no multiple of one; wide rows by the Gram matrix and without it.
SMALL = (
    attention(2, 70, 131, 2, 40),
    attention(1, 9, 600, 1, 64),
    packed_projection(2, 67, 2, 64),
    packed((33, 0, 70, 5), 2, 32, beyond=3),
    memory(70, 2, 64, 300, 32),
    memory(70, 2, 64, 300, None),
    *similarities(3, 37, 2, 50, 40),
    *similarities(2, 70, 3, 197, 72),
)
MODEL = (
    attention(64, 197, 197, 12, 64),
    packed_projection(256, 50, 12, 64),
    packed(report_lengths(128), 12, 64),
    memory(64 * 98, 12, 64, 2048, 32),
    memory(64 * 98, 12, 64, 2048, None),
    *similarities(64, 64, 64, 49, 128),
    *similarities(64, 64, 64, 196, 768),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Make all small calls; what they give is looked at elsewhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.calls")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    for dtype in DTYPES:
        for call in SMALL:
            call.problem(dtype, arguments.backend, arguments.device)()
            print(f"{arguments.backend} {dtype} {call}", flush=True)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
