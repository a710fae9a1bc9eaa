"""Fit an encoder's tensors into ours where sizes may differ, and keep account of every one."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.image_encoder import fixed_positions, fold_channels
from mpma_train.weights.files import Normalisation
from mpma_train.weights.names import Named

_PATCH = "embeddings.patch_embeddings.projection"
_POSITIONS = "embeddings.position_embeddings"
_WORDS = "embeddings.word_embeddings.weight"
_TEXT_POSITIONS = "embeddings.position_embeddings.weight"


@dataclass
class FitReport:
    """What became of a checkpoint.

    Attributes:
        source: where it came from.
        loaded: how many of our tensors it filled.
        changed: what was done to a tensor of ours so that it fits.
        missing: tensors of ours it has nothing for; they keep their new values.
        unused: tensors of its own that have no place here.
    """

    source: str
    loaded: int = 0
    changed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self, title: str) -> list[str]:
        """For a person; every key by its name."""
        total = self.loaded + len(self.missing)
        lines = [f"{title} from {self.source}: {self.loaded} of {total} tensors filled"]
        lines += [f"  changed {name}: {how}" for name, how in self.changed.items()]
        lines += [f"  missing, keeps its new values: {name}" for name in self.missing]
        lines += [f"  unused: {name}" for name in self.unused]
        return lines


Change = Callable[[dict[str, Named], dict[str, Tensor], FitReport], None]


@torch.no_grad()
def fit(
    encoder: nn.Module,
    named: dict[str, Named],
    every_source: set[str],
    source: str,
    changes: list[Change],
) -> FitReport:
    """Fill `encoder` in place.

    Args:
        encoder: ours, with its new values.
        named: the checkpoint's tensors under our names.
        every_source: all names in the checkpoint.
        source: what to call it.
        changes: called in turn before shapes are compared; each may replace tensors in `named`.

    Raises:
        ValueError: shapes differ where no change is known.
    """
    report = FitReport(source)
    targets = encoder.state_dict()
    for change in changes:
        change(named, targets, report)
    differing = [
        f"{name} {tuple(named[name].tensor.shape)} in the checkpoint ({named[name].source}), "
        f"{tuple(target.shape)} in the model"
        for name, target in targets.items()
        if name in named and named[name].tensor.shape != target.shape
    ]
    if differing:
        raise ValueError(f"{source}: shapes do not fit: {'; '.join(differing)}")
    found = [name for name in targets if name in named]
    encoder.load_state_dict({n: named[n].tensor for n in found}, strict=False)
    report.loaded = len(found)
    report.missing = sorted(targets.keys() - named.keys())
    report.unused = sorted(every_source - {named[name].source for name in found})
    return report


def fold_to_grey(theirs: Normalisation, ours: Normalisation) -> Change:
    """The change that makes a patch embedding for our normalisation, of one grey channel.

    Args:
        theirs: what the checkpoint was trained with, a value a channel.
        ours: of one grey channel.
    """

    def change(named: dict[str, Named], targets: dict[str, Tensor], report: FitReport) -> None:
        weight, bias = named[f"{_PATCH}.weight"], named.get(f"{_PATCH}.bias")
        old = targets[f"{_PATCH}.bias"] if bias is None else bias.tensor
        folded = fold_channels(
            weight.tensor.double(), old.double(), theirs.mean, theirs.std, ours.mean[0], ours.std[0]
        )
        for part, tensor in zip(("weight", "bias"), folded, strict=True):
            origin = named.get(f"{_PATCH}.{part}", weight).source
            named[f"{_PATCH}.{part}"] = Named(origin, tensor)
        report.changed[_PATCH] = (
            f"{weight.tensor.shape[1]} channels of mean {theirs.mean} and std {theirs.std} folded "
            f"into one of mean {ours.mean[0]:.6g} and std {ours.std[0]:.6g}"
        )

    return change


def fit_positions(config: MpmaConfig) -> Change:
    """The change that makes the position table one for our number of patches."""

    def change(named: dict[str, Named], targets: dict[str, Tensor], report: FitReport) -> None:
        source, table = named[_POSITIONS].source, named[_POSITIONS].tensor
        if table.ndim != 3 or table.shape[-1] != config.hidden_size:
            return
        count, notes = table.shape[1], []
        if math.isqrt(count) ** 2 == count:
            # timm's "no_embed_class": the class token has no position of its own.
            table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
            notes.append("a zero position added for the class token")
        side = math.isqrt(table.shape[1] - 1)
        if side * side != table.shape[1] - 1:
            raise ValueError(
                f"{report.source}: {source} has {count} positions, expected a square of patches "
                "and one class token"
            )
        ours = math.isqrt(targets[_POSITIONS].shape[1] - 1)
        sizes = f"from {side} × {side} patches to {ours} × {ours}"
        sines = fixed_positions(side, config.hidden_size).unsqueeze(0)
        if not torch.allclose(table.float(), sines, atol=1e-5):
            notes.append("learned positions, which training keeps as they are")
            if side != ours:
                table = _interpolate(table, side, ours)
                notes.append(f"interpolated {sizes}")
        elif side != ours:
            table = fixed_positions(ours, config.hidden_size).unsqueeze(0)
            notes.append(f"fixed sines and cosines recomputed {sizes}")
        named[_POSITIONS] = Named(source, table)
        if notes:
            report.changed[_POSITIONS] = ", ".join(notes)

    return change


def fit_text_tables(named: dict[str, Named], targets: dict[str, Tensor], report: FitReport) -> None:
    """The change that gives BERT's tables our number of positions and at least its vocabulary."""
    for name, may_shrink in ((_TEXT_POSITIONS, True), (_WORDS, False)):
        if name not in named:
            continue
        table, target = named[name].tensor, targets[name].clone()
        rows, ours = len(table), len(target)
        if rows == ours or table.shape[1:] != target.shape[1:]:
            continue
        if rows > ours and not may_shrink:
            raise ValueError(
                f"{report.source}: {named[name].source} has {rows} tokens, the model's vocabulary "
                f"only {ours}; prepare the data with this checkpoint's tokenizer"
            )
        kept = min(rows, ours)
        target[:kept] = table[:kept]
        named[name] = Named(named[name].source, target)
        rest = "the rest cut off" if rows > ours else f"{ours - rows} new ones added"
        report.changed[name] = f"the first {kept} of {rows} rows, {rest}"


def _interpolate(table: Tensor, side: int, ours: int) -> Tensor:
    grid = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(ours, ours), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
