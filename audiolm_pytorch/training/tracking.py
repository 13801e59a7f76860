"""What a run reports: rows of metrics in a JSONL file, and a progress bar where somebody watches."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["MetricsFile", "MetricWindow", "finite_or_none", "progress_bar", "with_chance"]


class MetricsFile:
    """Rows of metrics, one JSON object a line.

    Args:
        path: The file; nothing is touched before the first call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that JSON cannot hold become null.

        Args:
            row: Name to number, string or None.
        """
        values = {name: finite_or_none(value) for name, value in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Read all whole rows; a line that an interruption cut is passed over."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the rows past a step: a resumed run writes them again.

        Args:
            step: The last step to keep.
        """
        rows = self.rows()
        kept = [row for row in rows if row.get("step", 0) <= step]
        if not self.path.is_file():
            return
        shorter = self.path.with_name(self.path.name + ".tmp")
        shorter.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(shorter, self.path)


class MetricWindow:
    """Metrics since the last row, kept as they come: reading a tensor would wait for the device at every step."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}

    def add(self, prefix: str, metrics: Mapping[str, Tensor | float]) -> None:
        """Take the metrics of one batch.

        Args:
            prefix: Put before each name, with a slash.
            metrics: Name to scalar.
        """
        for name, value in metrics.items():
            self._values.setdefault(f"{prefix}/{name}", []).append(value)

    def read(self) -> dict[str, list[float]]:
        """Give all values as numbers; this waits for the device."""
        return {name: _numbers(values) for name, values in self._values.items()}

    def state(self) -> dict[str, list[float | None]]:
        """Give all values as JSON can hold them."""
        return {name: [finite_or_none(value) for value in values] for name, values in self.read().items()}

    def load_state(self, state: Mapping[str, list[float | None]]) -> None:
        """Take over what `state` gave, in place of what is here.

        Args:
            state: Name to numbers; None stands for one that was not finite.
        """
        self._values = {
            name: [math.nan if value is None else value for value in values] for name, values in state.items()
        }


def finite_or_none(value: Any) -> Any:
    """Replace a number that JSON cannot hold (NaN, infinities) by None.

    Args:
        value: Anything.

    Returns:
        The value, or None.
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_chance(values: Mapping[str, float], chance: Mapping[str, float]) -> dict[str, float]:
    """Put the level of guessing beside each metric that has one.

    Args:
        values: Metric name to value.
        chance: Metric name to what guessing reaches.

    Returns:
        The values, with `chance` for the loss and `<name>_chance` for others.
    """
    beside = {("chance" if name == "loss" else f"{name}_chance"): chance[name] for name in values if name in chance}
    return {**values, **beside}


def progress_bar(name: str, done: int, total: int, shown: bool) -> tqdm:
    """Make a progress bar on the terminal; silent where standard error is a file or a pipe.

    Args:
        name: Before the bar.
        done: Steps done already.
        total: Steps of the run.
        shown: False on all processes but the first.

    Returns:
        The bar; it leaves nothing behind.
    """
    return tqdm(desc=name, initial=done, total=total, leave=False, disable=not (shown and sys.stderr.isatty()))


def _numbers(values: list[Tensor | float]) -> list[float]:
    """Read scalars, those on a device in one transfer."""
    elsewhere = [value.detach() for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    read = iter(torch.stack([tensor.float() for tensor in elsewhere]).tolist() if elsewhere else [])
    return [
        next(read) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value) for value in values
    ]
