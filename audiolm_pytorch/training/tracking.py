"""Metrics of a training run: rows in a JSONL file, and a progress bar on a terminal."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from audiolm_pytorch.saving.files import staged_files
from audiolm_pytorch.saving.text import logger_named

__all__ = ["MetricWindow", "MetricsFile", "finite_or_none", "progress_bar"]


logger = logger_named(__name__)


class MetricsFile:
    """File of the metrics of a run, with one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics to the file; NaN and infinity become null."""
        values = {name: finite_or_none(value) for name, value in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Read all rows of metrics; a line that is incomplete after an interruption, or damaged, is skipped."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "phase" in row:
                rows.append(row)
        return rows

    def state(self) -> dict[str, Any]:
        """Return the number of bytes in the file and their SHA-256, for a checkpoint."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def remove_after(self, step: int, state: Mapping[str, Any]) -> None:
        """Remove the rows after a step, because a resumed run writes the rows again.

        A warning is logged if the rows before the step are not those of `state`; they have no influence on training.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        if hashlib.sha256(content[: state["num_bytes"]]).hexdigest() != state["sha256"]:
            logger.warning("%s has changed since the checkpoint of step %d was written", self.path, step)
        if not content:
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        with staged_files(self.path.parent) as stage:
            shorter = "".join(json.dumps(row) + "\n" for row in kept)
            (stage / self.path.name).write_text(shorter, encoding="utf-8")


class MetricWindow:
    """Metrics since the last written row; tensors stay on the device until the next row is written."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}

    def add(self, prefix: str, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one batch under the names `prefix/name`."""
        for name, value in metrics.items():
            self._values.setdefault(f"{prefix}/{name}", []).append(value)

    def read(self) -> dict[str, list[float]]:
        """Return all collected values as numbers; reading waits for the device."""
        return {name: _numbers(values) for name, values in self._values.items()}

    def state(self) -> dict[str, list[float | None]]:
        """Return all collected values as JSON-compatible data."""
        return {name: [finite_or_none(value) for value in values] for name, values in self.read().items()}

    def load_state(self, state: Mapping[str, list[float | None]]) -> None:
        """Restore the metric values that `state` returned; None becomes NaN."""
        self._values = {
            name: [math.nan if value is None else value for value in values] for name, values in state.items()
        }


def finite_or_none(value: Any) -> Any:
    """Return None for a number that JSON cannot represent (NaN, infinities), else the number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_bar(name: str, done: int, total: int, shown: bool) -> tqdm:
    """Create a progress bar, which has no output if standard error is not a terminal."""
    return tqdm(desc=name, initial=done, total=total, leave=False, disable=not (shown and sys.stderr.isatty()))


def _numbers(values: list[Tensor | float]) -> list[float]:
    """Convert scalars to numbers, with a single transfer for all scalars on a device."""
    on_device = [value.detach() for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    read = iter(torch.stack([tensor.float() for tensor in on_device]).tolist() if on_device else [])
    return [
        next(read) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value) for value in values
    ]
