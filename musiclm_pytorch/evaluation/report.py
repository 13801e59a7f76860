"""Metrics with chance levels and confidence intervals, and reports that list metrics."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import staged_files, write_json
from audiolm_pytorch.saving.text import printable

__all__ = [
    "MetricValue",
    "accuracy_metric",
    "accuracy_statistic",
    "aligned_table",
    "bootstrap_interval",
    "markdown_table",
    "write_report",
]

FORMAT_VERSION = 2
BOOTSTRAP_ROUNDS = 1000

# From indices of items, with repetitions, to a number.
Statistic = Callable[[np.ndarray], float]


@typed
def bootstrap_interval(
    statistic: Statistic, count: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> tuple[float, float]:
    """Compute the 95% confidence interval of a statistic of `count` items.

    The method is the percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, sec. 13.3).
    """
    if count < 1:
        raise ValueError("a confidence interval needs at least one item, got none")
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count)) for _ in range(rounds)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class MetricValue:
    """Result of a measurement, with confidence interval and chance level.

    The name has the form `group / condition / measure`. Fractions are in 0..1, not in per cent. `low` and `high` are
    the ends of the 95% bootstrap interval of `value`, which is a statistic of `count` items. `chance` is the expected
    result of random answers, or None if random answers are not possible.
    """

    name: str
    value: float
    low: float
    high: float
    chance: float | None
    count: int
    note: str = ""

    @classmethod
    @typed
    def measured(
        cls,
        name: str,
        statistic: Statistic,
        count: int,
        chance: float | None = None,
        note: str = "",
        rounds: int = BOOTSTRAP_ROUNDS,
    ) -> "MetricValue":
        """Build a metric from a statistic of `count` items, with a bootstrap confidence interval."""
        low, high = bootstrap_interval(statistic, count, rounds)
        return cls(name, float(statistic(np.arange(count))), low, high, chance, count, note)

    @classmethod
    @typed
    def mean(
        cls, name: str, values: Sequence[float] | np.ndarray, chance: float | None = None, note: str = ""
    ) -> "MetricValue":
        """Build a metric from the mean of one value per item."""
        known = np.asarray(values, dtype=float)
        return cls.measured(name, lambda rows: float(known[rows].mean()), len(known), chance, note)

    def text(self, digits: int, scale: float = 1.0) -> str:
        """Format the value and, in brackets, the confidence interval, both multiplied by `scale`."""
        value, low, high = (f"{scale * number:.{digits}f}" for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


@typed
def accuracy_statistic(truth: Sequence[str], answers: Sequence[str], balanced: bool = False) -> Statistic:
    """Build a function that receives indices of items and returns the accuracy of the answers for these items.

    If `balanced` is True, the accuracy is the mean recall of all classes, so that rare and frequent ones count equally.
    """
    if len(truth) != len(answers) or not truth:
        raise ValueError(f"need one answer per true class, got {len(answers)} answers and {len(truth)} true classes")
    _, class_of = np.unique(np.asarray(truth), return_inverse=True)
    is_right = np.asarray(truth) == np.asarray(answers)

    def statistic(rows: np.ndarray) -> float:
        if not balanced:
            return float(is_right[rows].mean())
        totals = np.bincount(class_of[rows])
        right = np.bincount(class_of[rows], weights=is_right[rows])
        return float((right[totals > 0] / totals[totals > 0]).mean())

    return statistic


@typed
def accuracy_metric(
    name: str,
    truth: Sequence[str],
    answers: Sequence[str],
    balanced: bool = False,
    note: str = "",
    chance: float | None = None,
) -> MetricValue:
    """Build a metric from the accuracy of answers; the default chance level is the accuracy of a uniform guess."""
    statistic = accuracy_statistic(truth, answers, balanced)
    chance = 1 / len(set(truth)) if chance is None else chance
    return MetricValue.measured(name, statistic, len(truth), chance=chance, note=note)


@typed
def aligned_table(cells: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table with aligned columns; the first row is the header."""
    cells = [[printable(cell) for cell in line] for line in cells]  # such as names of files
    widths = [max(map(len, column)) for column in zip(*cells)]
    head, *lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    rule = ["-" * width for width in widths]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


@typed
def markdown_table(metrics: Sequence[MetricValue]) -> str:
    """Format metrics as a Markdown table with one line per metric."""
    cells = [["metric", "value", "95% interval", "chance", "n", "note"]]
    for metric in metrics:
        interval = f"{_three_digits(metric.low)} to {_three_digits(metric.high)}"
        cells.append([metric.name, _three_digits(metric.value), interval, _three_digits(metric.chance)])
        cells[-1] += [str(metric.count), metric.note]
    return aligned_table([[cell.replace("|", "/") for cell in line] for line in cells])


def _three_digits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


@typed
def write_report(
    path: str | Path, metrics: Sequence[MetricValue], settings: dict[str, Any], table: str | None = None
) -> None:
    """Write metrics to the JSON file `path`, and a table (default: `markdown_table`) to the Markdown file beside it."""
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"cannot write a report to {path}; use a name that ends in .json")
    rows = [asdict(metric) for metric in metrics]
    write_json(path, {"format_version": FORMAT_VERSION, "settings": settings, "metrics": rows})
    with staged_files(path.parent) as stage:
        (stage / path.with_suffix(".md").name).write_text(table or markdown_table(metrics), encoding="utf-8")
