"""Metrics that can be believed: each with its chance level, its number of items and a bootstrap interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from beartype import beartype

from audiolm_pytorch.saving.files import staged_files, write_json

__all__ = [
    "Metric",
    "accuracy_metric",
    "accuracy_statistic",
    "aligned_table",
    "balanced_accuracy",
    "bootstrap_interval",
    "markdown_table",
    "mean_of_classes",
    "write_report",
]

FORMAT_VERSION = 1
BOOTSTRAP_ROUNDS = 1000


@beartype
def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], count: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap over items (Efron & Tibshirani, An Introduction to the Bootstrap, sec. 13.3).

    Args:
        statistic: From indices of items (with repetitions) to the number.
        count: Items there are.
        rounds: Resamples.
        seed: The same seed gives the same interval.

    Returns:
        The 2.5% and 97.5% points of the resampled statistic.

    Raises:
        ValueError: If there are no items.
    """
    if count < 1:
        raise ValueError("an interval needs at least one item, got none")
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(count, size=count)) for _ in range(rounds)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        name: What was measured, as `group / condition / measure`.
        value: The number; shares lie in 0..1.
        low: Lower end of the 95% bootstrap interval.
        high: Its upper end.
        chance: What guessing gives; None where there is no such thing.
        count: Items measured.
        note: What else the reader must know.
    """

    name: str
    value: float
    low: float
    high: float
    chance: float | None
    count: int
    note: str = ""

    @classmethod
    @beartype
    def measured(
        cls,
        name: str,
        statistic: Callable[[np.ndarray], float],
        count: int,
        chance: float | None = None,
        note: str = "",
    ) -> "Metric":
        """Evaluate a statistic on all items, and on resamples for its interval.

        Args:
            name: What is measured.
            statistic: From indices of items (with repetitions) to the number.
            count: Items there are.
            chance: What guessing gives.
            note: What else the reader must know.

        Returns:
            The metric.
        """
        low, high = bootstrap_interval(statistic, count)
        return cls(name, float(statistic(np.arange(count))), low, high, chance, count, note)


@beartype
def balanced_accuracy(truth: Sequence[str], answers: Sequence[str]) -> float:
    """Average the share of right answers over the true classes: a frequent class counts no more than a rare one.

    Args:
        truth: What is right.
        answers: What was said.

    Returns:
        In 0..1; one over the number of true classes for any constant answer among them.

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    return accuracy_statistic(truth, answers, balanced=True)(np.arange(len(truth)))


def mean_of_classes(class_of: np.ndarray, is_right: np.ndarray) -> float:
    """Average the shares of right answers over the classes that occur."""
    totals = np.bincount(class_of)
    right = np.bincount(class_of, weights=is_right)
    return float((right[totals > 0] / totals[totals > 0]).mean())


def _require_pairs(truth: Sequence[str], answers: Sequence[str]) -> None:
    """Raise unless there is one answer for each of at least one truth."""
    if len(truth) != len(answers) or not truth:
        raise ValueError(f"need as many answers as truths and at least one, got {len(answers)} and {len(truth)}")


@beartype
def accuracy_metric(
    name: str, truth: Sequence[str], answers: Sequence[str], balanced: bool = False, note: str = ""
) -> Metric:
    """Measure how often answers are right.

    Args:
        name: What is measured.
        truth: What is right.
        answers: What was said.
        balanced: Weigh the true classes alike.
        note: What else the reader must know.

    Returns:
        The metric; chance is that of a uniform guess among the classes that occur in `truth`.

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    statistic = accuracy_statistic(truth, answers, balanced)
    return Metric.measured(name, statistic, len(truth), chance=1 / len(set(truth)), note=note)


@beartype
def accuracy_statistic(
    truth: Sequence[str], answers: Sequence[str], balanced: bool = False
) -> Callable[[np.ndarray], float]:
    """Make the accuracy of answers a function of the items looked at, as resampling needs it.

    Args:
        truth: What is right.
        answers: What was said.
        balanced: Weigh the true classes alike.

    Returns:
        From indices of items to the share of right answers among them.

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    _require_pairs(truth, answers)
    _, class_of = np.unique(np.asarray(truth), return_inverse=True)
    is_right = np.asarray(truth) == np.asarray(answers)

    def statistic(chosen: np.ndarray) -> float:
        return mean_of_classes(class_of[chosen], is_right[chosen]) if balanced else float(is_right[chosen].mean())

    return statistic


def _shown(value: float | None) -> str:
    """Three decimals, or nothing."""
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


@beartype
def markdown_table(metrics: Sequence[Metric]) -> str:
    """Set metrics as a table.

    Args:
        metrics: In the order wanted.

    Returns:
        Markdown, ending in a line break.
    """
    lines = ["| metric | value | 95% interval | chance | n | note |", "|---|---|---|---|---|---|"]
    for metric in metrics:
        interval = f"{_shown(metric.low)} to {_shown(metric.high)}"
        cells = [metric.name, _shown(metric.value), interval, _shown(metric.chance), str(metric.count), metric.note]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


@beartype
def aligned_table(cells: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns are aligned in plain text too.

    Args:
        cells: The head, then one list per line, all of equal length.
    """
    widths = [max(map(len, column)) for column in zip(*cells)]
    head, *lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    rule = ["-" * width for width in widths]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


@beartype
def write_report(
    path: str | Path, metrics: Sequence[Metric], settings: dict[str, Any], table: str | None = None
) -> None:
    """Write metrics as JSON and, beside it, as a markdown table.

    Args:
        path: The JSON file; the table gets the same name with the suffix `.md`.
        metrics: In the order wanted.
        settings: How they came about; JSON-able.
        table: Another table to write beside them (markdown); by default one line a metric.

    Raises:
        ValueError: If the path does not end in `.json`, or a value is not finite.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: the report is JSON; use a name that ends in .json")
    rows = [asdict(metric) for metric in metrics]
    write_json(path, {"format_version": FORMAT_VERSION, "settings": settings, "metrics": rows})
    with staged_files(path.parent) as stage:
        (stage / path.with_suffix(".md").name).write_text(table or markdown_table(metrics), encoding="utf-8")
