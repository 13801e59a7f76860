"""Metrics of a training run: rows in a JSONL file, trackers, and a progress bar or lines in a log."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from audiolm_pytorch.saving.files import staged_files
from audiolm_pytorch.saving.text import logger_named

if TYPE_CHECKING:
    import accelerate

__all__ = [
    "MetricWindow",
    "MetricsFile",
    "ProgressLog",
    "check_trackers",
    "finite_or_none",
    "progress_bar",
    "running_trackers",
]

_LOG_EVERY_SECONDS = 180.0

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


class ProgressLog:
    """Logs the progress of a run every few minutes if standard error is not a terminal, which has a progress bar.

    The minutes count from the last line of any log of the process, since one log may be short. `unit` is the name of a
    step.
    """

    _logged: float = math.inf  # time of the last line

    def __init__(self, name: str, done: int, total: int, shown: bool, unit: str = "step") -> None:
        self.name, self.done, self.total, self.unit = name, done, total, unit
        self._is_shown = shown and not sys.stderr.isatty()
        self._started = time.monotonic()
        ProgressLog._logged = min(ProgressLog._logged, self._started)

    def update(self, step: int, metrics: Mapping[str, float | None] = MappingProxyType({})) -> None:
        """Log the completed steps, the latest losses and the remaining time if the last line is old enough."""
        now = time.monotonic()
        if not self._is_shown or step <= self.done or now - ProgressLog._logged < _LOG_EVERY_SECONDS:
            return
        ProgressLog._logged = now
        losses = "".join(
            f", {name} {value:.4g}" for name, value in metrics.items() if name.endswith(".loss") and value is not None
        )
        step_seconds = (now - self._started) / (step - self.done)
        minutes = step_seconds * (self.total - step) / 60
        logger.info(
            "%s: %s %d of %d%s, %.3g s per %s, %.0f min left",
            *(self.name, self.unit, step, self.total, losses, step_seconds, self.unit, minutes),
        )


def check_trackers(names: Sequence[str]) -> None:
    """Check that accelerate has trackers with these names, and that their packages are installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"there is no tracker {name!r}; choose one of: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            package = '"musiclm[track]"' if name == "tensorboard" else name
            raise ImportError(f"the tracker {name} is not installed; install it with: pip install {package}")


@contextmanager
def running_trackers(
    accelerator: "accelerate.Accelerator", folder: Path, settings: Mapping[str, Any]
) -> Iterator[None]:
    """Start the trackers of an Accelerator for the run in a folder, and end them, unless the caller has started them.

    The trackers receive those settings that are numbers or texts.
    """
    if not accelerator.log_with or accelerator.trackers:
        yield
        return
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    folder = folder.resolve()
    accelerator.init_trackers(f"{folder.parent.name}-{folder.name}", config=plain)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _numbers(values: list[Tensor | float]) -> list[float]:
    """Convert scalars to numbers, with a single transfer for all scalars on a device."""
    on_device = [value.detach() for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    read = iter(torch.stack([tensor.float() for tensor in on_device]).tolist() if on_device else [])
    return [
        next(read) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value) for value in values
    ]
