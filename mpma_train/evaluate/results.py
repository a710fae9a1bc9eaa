"""The result of an evaluation: its JSON file and its printed table."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.table import Table

Numbers = dict[str, float | None]


@dataclass
class Result:
    """One evaluation of one model on one split.

    Attributes:
        task: name of the evaluation, and of its file.
        model: the model's directory.
        data: the prepared store's directory.
        n: number of held-out items measured.
        seed: decides every random draw of the evaluation.
        metrics: name -> value, None where nothing could be measured.
        baselines: baseline -> name -> value, under the names that `metrics` uses.
        intervals: name -> [lower, upper], 95 %.
        details: settings and counts a reader needs to judge the numbers.
    """

    task: str
    model: str
    data: str
    n: int
    seed: int
    metrics: Numbers
    baselines: dict[str, Numbers]
    intervals: dict[str, list[float] | None] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)

    def save(self) -> Path:
        """Write `<model>/eval/<task>.json` and return its path.

        Raises:
            ValueError: a value is NaN or infinite, which JSON cannot hold.
        """
        path = result_path(self.model, self.task)
        try:
            text = json.dumps(asdict(self), indent=2, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{self.task}: a result is NaN or infinite: {self.metrics}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read a result back.

        Raises:
            ValueError: the file is no JSON object with exactly this class's fields.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected a JSON result, got {error}") from error
        expected = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path}: expected the fields {sorted(expected)}, got {found}")
        return cls(**values)

    def table(self) -> Table:
        """The metrics, one a row, beside every baseline."""
        table = Table()
        table.add_column(self.task, no_wrap=True)
        table.add_column("model", justify="right")
        if self.intervals:
            table.add_column("95 %", justify="right", no_wrap=True)
        for baseline in self.baselines:
            table.add_column(baseline, justify="right")
        for name, value in self.metrics.items():
            interval = [format_interval(self.intervals.get(name))] if self.intervals else []
            others = [format_number(numbers.get(name)) for numbers in self.baselines.values()]
            table.add_row(name, format_number(value), *interval, *others)
        return table

    def caption(self) -> str:
        """Size, seed and details in one line."""
        details = "".join(f" · {key} {format_detail(value)}" for key, value in self.details.items())
        return f"{self.data} · n {self.n} · seed {self.seed}{details}"


def result_path(model: str, task: str) -> Path:
    """Where the result of an evaluation of a model directory lies."""
    return Path(model) / "eval" / f"{task}.json"


def format_number(value: float | None) -> str:
    """Three decimals, one from 10 on; a dash for what was not measured."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def format_interval(interval: list[float] | None) -> str:
    """Both ends; empty where there is none."""
    return "" if interval is None else "–".join(map(format_number, interval))


def format_detail(value: object) -> str:
    """A list by its items, "none" when empty."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
