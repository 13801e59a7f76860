"""Curves of a healthy codec training, which others are compared with (see `watch.py`).

Absolute losses do not carry over to other data, sizes and bitrates; these figures do, and only they are compared:

- Mel distances are divided by that of the average spectrum of the same audio: 1 is a codec that has learnt nothing but
  how its data sound on the whole, whatever their loudness, bandwidth and liveliness. What remains is that a smaller
  codec, a lower bitrate or a smaller batch is behind; hence the wide corridor.
- Usage of codes is divided by what so much audio should use, whatever the size of the codebook and of the validation.
- The commitment loss is divided by its first value after the codes came into use.
- The hinge loss of discriminators is 2 where they tell nothing apart and 0 where they tell everything apart, on any
  data.

A run is compared at the earlier of two places of the reference: the same number of steps, and the same share of the
run. A short run is thus not expected to be where a long one ends, nor a long one to be there sooner than at that share.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.saving.files import read_json, staged_files, write_json
from audiolm_pytorch.training.tracking import MetricsFile

__all__ = [
    "COLLAPSED",
    "COMMITMENT_FACTOR",
    "MEL_FACTOR",
    "NOTHING_LEARNT",
    "SKIPPED_SHARE",
    "STILL_LEARNING",
    "STUCK",
    "USAGE_FACTOR",
    "Curves",
    "RowReader",
    "draw_curves",
    "packaged_reference",
    "read_curves",
    "write_reference",
]

_FORMAT_VERSION = 1
_PACKAGED = Path(__file__).with_name("reference_curves.json")
_TITLES = {
    "train_mel": "mel distance in training / that of the average spectrum",
    "valid_mel": "mel distance in validation / that of the average spectrum",
    "usage_level_1": "usage of level 1 / expected of so much audio",
    "usage_lowest": "usage of the least used level / expected",
    "commitment": "commitment loss / its first value",
    "discriminator": "hinge loss of the discriminators",
}
_MEL_CURVES, _USAGE_CURVES = ("train_mel", "valid_mel"), ("usage_level_1", "usage_lowest")

MEL_FACTOR = 1.6
NOTHING_LEARNT = 0.95  # of a mel distance, from a quarter of the run or 5000 steps on
STILL_LEARNING = 0.9  # of the distance at the validation before: then it is too early to tell
USAGE_FACTOR = 0.1
COMMITMENT_FACTOR = 5.0
COLLAPSED, STUCK = 0.05, 1.98
SKIPPED_SHARE = 0.02
# Audio that hardly changes in time is its own average, which a codec cannot be expected to stay below (nepers).
_LEAST_DISTANCE = 1.0


@dataclass(frozen=True)
class Curves:
    """The figures of a run that carry over to others.

    Attributes:
        num_train_steps: Length of the run.
        points: Name of a figure to pairs of step and value, in order of the steps.
        about: What was trained on what.
    """

    num_train_steps: int
    points: dict[str, list[tuple[int, float]]]
    about: str = ""

    def around(self, name: str, step: float) -> list[float]:
        """Values from half of a step up to it; none before the curve begins."""
        points = self.points.get(name, [])
        return [value for at, value in points if step / 2 <= at <= step] or [v for at, v in points if at <= step][-1:]


class RowReader:
    """Turns rows of metrics into figures that carry over; it remembers what they are divided by."""

    def __init__(self) -> None:
        self.average: float | None = None
        self.first_commitment: float | None = None
        self.codes_from: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Give the figures of a row; numbers that were not finite are passed over."""
        if row.get("phase") == "valid":
            return self._valid(row)
        if row.get("phase") == "generator":
            return self._generator(row)
        if row.get("phase") == "discriminator" and row.get("loss") is not None:
            return {"discriminator": float(row["loss"])}
        return {}

    def _valid(self, row: Mapping[str, Any]) -> dict[str, float]:
        self.average = row.get("mel_distance_of_average") or self.average
        figures: dict[str, float] = {}
        if self.average and row.get("mel_distance") is not None:
            figures["valid_mel"] = row["mel_distance"] / max(self.average, _LEAST_DISTANCE)
        usage = [value for name, value in row.items() if name.startswith("usage_level_") and value is not None]
        if usage and row.get("usage_expected"):
            figures["usage_level_1"] = row["usage_level_1"] / row["usage_expected"]
            figures["usage_lowest"] = min(usage) / row["usage_expected"]
        return figures

    def _generator(self, row: Mapping[str, Any]) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.average and row.get("mel") is not None:
            figures["train_mel"] = row["mel"] / max(self.average, _LEAST_DISTANCE)
        if "usage_level_1" in row and self.codes_from is None:
            self.codes_from = row["step"]
        commitment = row.get("commitment")
        if commitment is not None and commitment > 0:
            self.first_commitment = self.first_commitment or commitment
            figures["commitment"] = commitment / self.first_commitment
        return figures


@beartype
def read_curves(
    rows: Iterable[Mapping[str, Any]] | str | Path, num_train_steps: int | None = None, about: str = ""
) -> Curves:
    """Take the figures that carry over out of the metrics of a run.

    Args:
        rows: Rows of a codec's training, or the `metrics.jsonl` that holds them.
        num_train_steps: Length of the run; the last step of the rows if not given.
        about: What was trained on what.

    Returns:
        The curves.

    Raises:
        ValueError: There are no rows of a codec's training with a validation.
    """
    where = f"{rows}: " if isinstance(rows, str | Path) else ""
    rows = MetricsFile(Path(rows)).rows() if isinstance(rows, str | Path) else list(rows)
    reader, points = RowReader(), dict[str, list[tuple[int, float]]]()
    # what the first validation tells of the data holds for the rows before it
    average = next((row["mel_distance_of_average"] for row in rows if row.get("mel_distance_of_average")), None)
    if average is None:
        raise ValueError(f"{where}no row of a validation with mel_distance_of_average; is this a codec's training?")
    reader.average = average
    for row in rows:
        for name, value in reader(row).items():
            points.setdefault(name, []).append((row["step"], round(value, 5)))
    return Curves(num_train_steps or max(row["step"] for row in rows), points, about)


@beartype
def write_reference(
    metrics_jsonl: str | Path, out_json: str | Path, picture: str | Path | None = None, about: str = ""
) -> Curves:
    """Make the reference out of a healthy, finished run.

    Args:
        metrics_jsonl: Of the run.
        out_json: The reference to write, e.g. `reference_curves.json` of this package.
        picture: PNG of its curves, if wanted (needs matplotlib).
        about: What was trained on what, and what became of it.

    Returns:
        The curves.
    """
    curves = read_curves(metrics_jsonl, about=about)
    held = {"format_version": _FORMAT_VERSION, "about": about, "num_train_steps": curves.num_train_steps}
    write_json(out_json, held | {"points": curves.points})
    if picture is not None:
        draw_curves({"reference": curves}, picture)
    return curves


@beartype
def packaged_reference(path: str | Path = _PACKAGED) -> Curves:
    """Read a reference.

    Args:
        path: As written by `write_reference`; that of this package if not given.

    Returns:
        Its curves.

    Raises:
        ValueError: The file is missing or of another format.
    """
    held = read_json(path)
    if held.get("format_version") != _FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {held.get('format_version')!r}, this program reads 1")
    points = {name: [(step, value) for step, value in pairs] for name, pairs in held["points"].items()}
    return Curves(held["num_train_steps"], points, held["about"])


@beartype
def draw_curves(runs: Mapping[str, Curves], path: str | Path) -> None:
    """Draw the curves of one or more runs into a picture, e.g. one's own over the reference.

    Args:
        runs: Title to curves; the range that `CurveWatch` takes for usual is shaded around the first.
        path: Picture to write.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "musiclm-pytorch[plot]"') from error

    names = [name for name in _TITLES if any(name in curves.points for curves in runs.values())]
    figure = Figure(figsize=(11, 3 * -(-len(names) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(names) // 2), 2, squeeze=False).reshape(-1)
    for axis in axes[len(names) :]:
        axis.remove()
    for name, axis in zip(names, axes):
        for title, curves in runs.items():
            points = curves.points.get(name, [])
            axis.plot([step for step, _ in points], [value for _, value in points], label=title, linewidth=1.2)
        steps, lower, upper = _corridor(next(iter(runs.values())), name)
        axis.fill_between(steps, lower, upper, alpha=0.15, label="usual")
        axis.set(title=_TITLES[name], xlabel="steps")
        axis.set_ylim(bottom=0, top=None)
        axis.legend(fontsize="small")
    path = Path(path)
    with staged_files(path.parent) as stage:
        figure.savefig(stage / path.name, dpi=80)


def _corridor(curves: Curves, name: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, and the lowest and highest usual value at each."""
    steps = [step for step, _ in curves.points.get(name, [])]
    around = [curves.around(name, step) for step in steps]
    if name in _MEL_CURVES:
        return steps, [0.0] * len(steps), [MEL_FACTOR * max(values) for values in around]
    if name in _USAGE_CURVES:
        return steps, [USAGE_FACTOR * min(values) for values in around], [max(1.0, *values) for values in around]
    if name == "commitment":
        return steps, [0.0] * len(steps), [COMMITMENT_FACTOR * max(1.0, *values) for values in around]
    return steps, [COLLAPSED] * len(steps), [STUCK] * len(steps)
