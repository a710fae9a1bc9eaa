"""One contestant of a comparison: a function with operands, and whether two give the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Differing entries that are allowed: of nearly equal scores, two right evaluations keep either.
FLIPS = 0.01


@dataclass(frozen=True)
class Problem:
    """function(**operands), with the gradients of all floating operands where `backward` is set.

    Attributes:
        function: gives a tensor or a tuple of them.
        operands: by name; the floating ones are leaves.
        gradients: of the outputs.
        backward: outputs and gradients, or outputs alone, then without recording any graph.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    operands: dict[str, Any]
    gradients: tuple[Tensor, ...]
    backward: bool

    def __call__(self) -> tuple[Tensor, ...]:
        """The outputs, then, where wanted, a gradient for each floating operand."""
        with torch.set_grad_enabled(self.backward):
            outputs = self.function(**self.operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not self.backward:
            return outputs
        leaves = [x for x in self.operands.values() if _floating(x)]
        pairs = zip(self.gradients, outputs, strict=True)
        gradients = [gradient.to(output.dtype) for gradient, output in pairs]
        return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, gradients)

    def in_float32(self) -> "Problem":
        """The same values computed with in float32."""
        operands = {
            name: _leaf(operand.detach().float()) if _floating(operand) else operand
            for name, operand in self.operands.items()
        }
        return replace(self, operands=operands)


def random_operands(
    dtype: str, device: str, **sizes: Sequence[int]
) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Normally distributed leaves by name, and a function that draws more of what it is asked for.

    The values depend on the sizes alone, not on dtype or device.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, getattr(torch, dtype))

    return {name: _leaf(draw(*size)) for name, size in sizes.items()}, draw


def assert_same(ours: Sequence[Tensor], baseline: Sequence[Tensor], dtype: str) -> None:
    """Both computed the same, as far as `dtype` can tell: else the benchmark means nothing.

    All but a hundredth of the entries agree to half the digits of the dtype, √eps, of the root mean
    square of what is expected. NaN agrees with nothing.

    Raises:
        AssertionError: names the result, its share of differing entries and the largest difference.
    """
    tolerance = torch.finfo(getattr(torch, dtype)).eps ** 0.5
    for number, (got, expected) in enumerate(zip(ours, baseline, strict=True)):
        assert got.shape == expected.shape, f"result {number}: {got.shape}, {expected.shape}"
        difference = (got.double() - expected.double()).abs()
        allowed = tolerance * expected.double().square().mean().sqrt()
        share = (~(difference <= allowed)).double().mean().item()
        assert share <= FLIPS, (
            f"result {number}: {share:.1%} of the entries differ by more than {allowed:.3g}, "
            f"at most {difference.max():.3g}"
        )


def _floating(operand: Any) -> bool:
    return isinstance(operand, Tensor) and operand.is_floating_point()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()
