"""Searches the launch tables for what is fastest on this GPU; nothing else ever writes them.

`python -m mpma_ext.kernels.tune masked_attention 64 197 12 64` measures the operator at that size,
forward and backward, with other block sizes, warps and stages of every kernel that it launches,
and writes what was faster into the tables, under this GPU's generation. It takes minutes.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

import mpma_ext
from mpma_ext.kernels.launch import find, recorded, table

SIZES = {
    "masked_attention": ("batch", "length", "heads", "width"),
    "memory_attention": ("rows", "heads", "width", "slots"),
    "token_patch_similarity": ("batch", "tokens", "patches", "width"),
    "token_patch_max_similarity": ("batch", "tokens", "patches", "width"),
}
HALVED_AND_DOUBLED = {"num_warps": (1, 16), "REPORTS": (1, 16)}  # and block sizes, from 16 to 256
BLOCKS = (16, 256)
MOST_STAGES = 5
FASTER = 0.98  # of the time before: less is noise
# A candidate's results may differ by so many roundings of their largest number: other tiles, other
# orders of sums. What is wrong differs by more.
ROUNDINGS = 16

Launch = dict[str, int]


def neighbours(launch: Launch) -> Iterator[Launch]:
    """Launches that differ in one number, by a factor of two or by a stage."""
    for name, value in launch.items():
        if name == "num_stages":
            values = [v for v in (value - 1, value + 1) if 1 <= v <= MOST_STAGES]
        else:
            least, most = HALVED_AND_DOUBLED.get(name, BLOCKS)
            values = [v for v in (value // 2, value * 2) if least <= v <= most]
        for other in values:
            yield launch | {name: other}


def tune(
    call: Callable[[], Sequence[Tensor]],
    measure: Callable[[Callable], float],
    say: Callable[[str], None] = print,
) -> set[str]:
    """Replaces the rows that `call` launches by faster ones, in memory, one kernel after the other.

    Args:
        call: what is to be fast; gives results to compare.
        measure: the time of such a call, in any unit.
        say: told of every row that is replaced and of every candidate that cannot run.

    Returns:
        The stems of the tables that changed; `write` keeps them.
    """
    with recorded() as launches:
        expected = call()
    changed = set()
    for stem, kernel, generation, dtype, bucket in dict.fromkeys(launches):
        rows = table(stem)[kernel]
        before = best = find(rows, generation, dtype, bucket)
        own = rows.setdefault(generation, {}).setdefault(dtype, {})
        inherited = bucket not in own
        first = shortest = measure(call)
        seen = [best]
        while candidate := next((c for c in neighbours(best) if c not in seen), None):
            seen.append(candidate)
            own[bucket] = candidate
            try:
                reason = _difference(call(), expected)
                time = None if reason else measure(call)
            except TritonError as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if reason:
                say(f"{kernel} {bucket} {candidate}: {reason}")
            elif time < FASTER * shortest:
                best, shortest = candidate, time
            own[bucket] = best
        if best == before and inherited:
            _forget(rows, generation, dtype, bucket)
        if best != before:
            changed.add(stem)
            gain = f"{shortest / first:.2f} of the time"
            say(f"{kernel} {generation} {dtype} {bucket}: {best}, {gain}")
    return changed


def _forget(rows: dict, generation: str, dtype: str, bucket: str) -> None:
    """Leaves a row to the elder generation that had it, and nothing empty."""
    rows[generation][dtype].pop(bucket, None)
    if not rows[generation][dtype]:
        del rows[generation][dtype]
    if not rows[generation]:
        del rows[generation]


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with results, or None."""
    for number, (result, right) in enumerate(zip(results, expected, strict=True)):
        if right.numel() == 0:
            continue
        allowed = ROUNDINGS * torch.finfo(right.dtype).eps * right.abs().max().item()
        error = (result - right).abs().max().item()
        if not error <= allowed:
            return f"result {number} differs by {error:.3g}, more than {allowed:.3g}"
    return None


def text_of(rows: dict) -> str:
    """A table as it is written: a line a launch."""
    text = json.dumps(rows, indent=2)
    one_line = re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text)
    return one_line + "\n"


def write(stem: str) -> Path:
    """Writes a table that was changed in memory."""
    path = Path(__file__).with_name(f"{stem}.json")
    path.write_text(text_of(table(stem)))
    return path


def call_of(operator: str, sizes: Sequence[int], dtype: torch.dtype, topk: int | None) -> Callable:
    """The operator on random operands of that size on the GPU, forward and backward."""
    keywords = {}
    if operator == "masked_attention":
        shapes = [tuple(sizes)] * 3
    elif operator == "memory_attention":
        rows, heads, width, slots = sizes
        shapes = [(rows, heads, width), (slots, heads, width), (slots, heads, width)]
        keywords["topk"] = topk
    else:
        batch, tokens, patches, width = sizes
        shapes = [(batch, tokens, width), (batch, patches, width)]
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]
    if operator.startswith("token"):  # cosines, as in training
        leaves = [torch.nn.functional.normalize(leaf, dim=-1) for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    function = getattr(mpma_ext, operator)

    def call() -> list[Tensor]:
        results = function(*leaves, **keywords, backend="triton")
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.ones_like(result) for result in results]
        gradients = torch.autograd.grad(results, leaves, grads)
        return [*(result.detach() for result in results), *gradients]

    return call


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 where it cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m mpma_ext.kernels.tune", description=__doc__.splitlines()[0]
    )
    sizes = "; ".join(f"{name}: {' '.join(of)}" for name, of in SIZES.items())
    parser.add_argument("operator", choices=SIZES)
    parser.add_argument("size", nargs=4, type=int, help=sizes)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--topk", type=int, help="memory_attention: so many slots; all without it")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning measures, and there is no GPU to measure on", file=sys.stderr)
        return 2
    dtype = getattr(torch, arguments.dtype)
    call = call_of(arguments.operator, arguments.size, dtype, arguments.topk)
    changed = tune(call, lambda of: do_bench(of, return_mode="median"))
    for stem in sorted(changed):
        print("not written" if arguments.dry_run else f"written: {write(stem)}")
    if changed and not arguments.dry_run:
        print("make check-triton CHECK_ARGS=--write records what the new rows compile to")
    return 0


if __name__ == "__main__":
    sys.exit(main())
