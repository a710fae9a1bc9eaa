"""How far a kernel may be from the definition: the rule of the project, on one sample."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mpma_ext
from mpma_ext import reference


@dataclass
class Sample:
    """One call of an operator: floating operands by name, and everything else."""

    function: str
    operands: dict[str, Tensor]  # float32, rounded to the dtype
    rest: dict = field(default_factory=dict)
    poisoned: dict[str, Tensor] = field(default_factory=dict)  # True for a masked row
    integers: tuple[str, ...] = ()  # operands whose ties a nudge would break


class ProductsOf(TorchDispatchMode):
    """Every matrix product, of gradients too, has its operands rounded to `dtype`.

    With a generator, what is rounded is off by a random part of half a unit in the last place
    instead, either way: a few draws show what rounding comes to, where by luck it does little.
    """

    def __init__(self, dtype: torch.dtype, generator: torch.Generator | None = None):
        super().__init__()
        self.dtype, self.generator = dtype, generator

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            arguments = [self.rounded(a) for a in arguments]
        return function(*arguments, **(keywords or {}))

    def rounded(self, operand: Tensor) -> Tensor:
        rounded = operand.to(self.dtype).to(operand.dtype)
        if self.generator is None:
            return rounded
        part = torch.rand(operand.shape, generator=self.generator) - 0.5
        unit = torch.ldexp(part * torch.finfo(self.dtype).eps, operand.frexp().exponent - 1)
        return torch.where(rounded == operand, operand, operand + unit)


def check(generator, sample: Sample, dtype, wanted, layouts, *, backend="cpu") -> None:
    """Errors of the kernel are at most twice eager's in its dtype, three times for gradients.

    Eager is the definition with the operands of its products in that dtype, sums in float32, as
    autocast and tensor cores have them; but a result that comes in float32 is to have float32's
    accuracy, and nothing is rounded for it. For float64, eager is the definition in float32, its
    error times the ratio of their roundings. As eager may by luck be exact, its error is taken to
    be at least what operands off by 3 √n roundings make of the result, the most of a few draws: √n
    is the deviation of n independent roundings, those of the longest sum, and 3 deviations is where
    chance ends. One rounding of the result in its own dtype is allowed for.
    """
    kernel, definition = getattr(mpma_ext, sample.function), getattr(reference, sample.function)
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    shapes = [r.shape for r in outcome(sample, definition, [], None, dtype=torch.float64)[0]]
    grads = [torch.randn(s, generator=generator).to(dtype).double() for s in shapes]

    def of_backend(**arguments):
        return kernel(**arguments, backend=backend)

    ours = outcome(sample, of_backend, wanted, grads, dtype=dtype, layouts=layouts, poison=True)
    with ProductsOf(eager_dtype):
        plain = outcome(sample, definition, wanted, grads, dtype=eager_dtype)
    if any(result.dtype != eager_dtype for result in plain[0]):  # similarities of half precision
        plain = outcome(sample, definition, [], None, dtype=eager_dtype)[0], plain[1]
    truth = outcome(sample, definition, wanted, grads, dtype=torch.float64)
    longest = max(size for operand in sample.operands.values() for size in operand.shape)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = 3 * longest**0.5 * torch.finfo(sums).eps

    def nudge(tensor, by=rounding):
        signs = torch.randint(0, 2, tensor.shape, generator=generator).double() * 2 - 1
        return tensor.double() * (1 + by * signs)

    def moved():
        nudged = {n: t if n in sample.integers else nudge(t) for n, t in sample.operands.items()}
        # A row's weights come from a log-sum-exp as large as its scores, rounded when it was kept.
        moved_grads = [nudge(grad, rounding * max(1, largest_score(sample))) for grad in grads]
        return outcome(
            replace(sample, operands=nudged), definition, wanted, moved_grads, dtype=torch.float64
        )

    draws = [moved() for _ in range(3)]
    gradients = [draw[1] for draw in draws]
    for _ in range(0 if eager_dtype == torch.float32 else 3):
        with ProductsOf(eager_dtype, generator):
            drawn = outcome(sample, definition, wanted, grads, dtype=eager_dtype)
        gradients.append(drawn[1])
    nearby = [draw[0] for draw in draws], gradients
    for factor, part, names in ((2, 0, [None] * len(grads)), (3, 1, wanted)):
        for got, rough, exact, name, *near in zip(
            ours[part], plain[part], truth[part], names, *nearby[part], strict=True
        ):
            error = largest(rough - exact) * torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
            error = max(error, *(largest(n - exact) for n in near))
            error = max(error, cancelled(sample, name, grads, truth[0], rounding, dtype))
            allowed = factor * error + torch.finfo(got.dtype).eps * largest(exact)
            assert got.isfinite().all(), f"{sample.function}: not finite"
            assert largest(got - exact) <= allowed, f"{largest(got - exact)} > {allowed}"
    for name, gradient in zip(wanted, ours[1], strict=True):
        if name in sample.poisoned:
            assert not gradient[sample.poisoned[name]].any(), f"{name}: gradient of what is masked"


def query_and_key(sample: Sample) -> tuple[Tensor, Tensor]:
    """What an attention scores, packed or not."""
    if "qkv" in sample.operands:
        return sample.operands["qkv"].unbind(2)[:2]
    query, key, _ = sample.operands.values()
    return query, key


def largest_score(sample: Sample) -> float:
    """At most so large are an attention's scaled scores; 0 for the similarities."""
    if "tokens" in sample.operands:
        return 0.0
    query, key = query_and_key(sample)
    scale = abs(sample.rest.get("scale", query.shape[-1] ** -0.5))
    return scale * largest(query.norm(dim=-1)) * largest(key.norm(dim=-1))


def cancelled(sample: Sample, name: str | None, grads, outputs, rounding, dtype) -> float:
    """The rounding of terms that cancel in a gradient, however small is what remains of them.

    Attention: the gradient of a score is weight · (⟨dO, v⟩ - ⟨dO, output⟩), equal terms where one
    key has all the weight; it multiplies the operand that is scored. The output was kept in its own
    dtype. Softmax similarity: the gradient of a cosine is (ĉ - cos · ŵ) / |w|, equal terms where
    token and attended patch are parallel.
    """
    operands = sample.operands
    if name in ("query", "key", "memory_key", "qkv"):
        query, key = query_and_key(sample)
        scored = {"query": largest(key), "qkv": max(largest(query), largest(key))}
        scale = abs(sample.rest.get("scale", query.shape[-1] ** -0.5))
        terms = largest((grads[0] * outputs[0]).abs().sum(-1)) * scale
        kept = max(rounding, torch.finfo(dtype).eps)
        return kept * terms * scored.get(name, largest(query))
    if name == "tokens" and "pooling_temperature" in sample.rest and operands["tokens"].numel():
        shortest = operands["tokens"].norm(dim=-1).min().item()
        return rounding * sample.rest["pooling_temperature"] * largest(grads[0]) / shortest
    return 0.0


def outcome(
    sample: Sample, function: Callable, wanted, grads, *, dtype, layouts=None, poison=False
):
    """Results and the wanted gradients of one evaluation in `dtype`."""
    leaves, views = {}, {}
    for number, (name, operand) in enumerate(sample.operands.items()):
        values = operand.detach().to(dtype)
        if poison and name in sample.poisoned:
            values = values.clone()
            values[sample.poisoned[name]] = (torch.nan, torch.inf)[number % 2]
        leaves[name] = values.requires_grad_(name in wanted)
        views[name] = laid_out(values, layouts[number]) if layouts else values
    results = function(**views, **sample.rest)
    results = results if isinstance(results, tuple) else (results,)
    if not wanted:
        return [r.detach() for r in results], []
    grads = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    gradients = torch.autograd.grad(results, [leaves[n] for n in wanted], grads)
    return [r.detach() for r in results], list(gradients)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan)
        return wide[..., 1::2].copy_(tensor)
    if layout == "inner":  # the heads or rows of a larger tensor
        wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3, *tensor.shape[2:]), torch.nan)
        return wide[:, 2:-1].copy_(tensor)
    return tensor


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
