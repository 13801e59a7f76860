"""Plots of a sound, of a similarity matrix and of metrics, drawn with matplotlib (extra [plot])."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import staged_files
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["PICTURE_SUFFIXES", "plot_metrics", "plot_similarities", "plot_wave", "require_matplotlib"]

PICTURE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg")
# A class with a smaller share of an axis has no room for its name.
_MIN_NAMED_SHARE = 0.014


def require_matplotlib() -> None:
    """Raise an ImportError that contains the `pip install` command if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "musiclm[plot]"') from error


def _new_figure(inches: tuple[float, float]) -> Any:
    """Create a figure that needs no display and does not use the global state of pyplot."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write_figure(figure: Any, path: str | Path) -> None:
    path = Path(path)
    with staged_files(path.parent) as stage:
        figure.savefig(stage / path.name, dpi=100)


def _title_line(text: str) -> str:
    """Shorten a title to one line of at most 90 characters, and replace characters that cannot be encoded."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())[:90]


@typed
def plot_wave(wave: Tensor, sample_hz: int, path: str | Path, title: str = "") -> None:
    """Plot a wave `[n]` in [-1, 1] and its log-mel spectrogram into an image file (.png, .svg, .pdf or .jpg)."""
    figure = _new_figure((9, 5))
    seconds = wave.shape[-1] / sample_hz
    mel = MelSpectrogram(sample_hz=sample_hz, n_fft=1024, hop_length=256, num_mels=80)(wave)
    decibel = 20 * mel.clamp(min=1e-5).log10()
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    top.plot(torch.linspace(0, seconds, wave.shape[-1]), wave, linewidth=0.4)
    top.set(ylabel="amplitude", ylim=(-1, 1))
    # Without parse_math=False a "$" starts a formula.
    top.set_title(_title_line(title), parse_math=False)
    extent, lowest_db = (0, seconds, 0, len(decibel)), float(decibel.max()) - 80
    bottom.imshow(decibel, origin="lower", aspect="auto", extent=extent, vmin=lowest_db, cmap="magma")
    bottom.set(xlabel="seconds", ylabel="mel band")
    _write_figure(figure, path)


@typed
def plot_similarities(
    cosines: Tensor, text_classes: list[str], clip_classes: list[str], path: str | Path, title: str = ""
) -> None:
    """Plot the cosines `[t, c]` of texts and clips into an image file, with class names along both axes."""
    figure = _new_figure((10.5, 9))
    axes = figure.subplots()
    image = axes.imshow(cosines, cmap="magma", aspect="auto")
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set_xticks(*_class_ticks(clip_classes), rotation=45, ha="right", parse_math=False)
    axes.set_yticks(*_class_ticks(text_classes), parse_math=False)
    axes.set(xlabel="clips", ylabel="texts, each at the position of its first clip")
    axes.set_title(_title_line(title), parse_math=False)
    _write_figure(figure, path)


@typed
def plot_metrics(values: Sequence[MetricValue], path: str | Path) -> None:
    """Plot values named `metric / set / measure` into an image file, one panel a measure, one line a set of clips.

    A line is the 95% interval, a dot the value, and a dashed line the chance level.
    """
    panels: dict[str, list[tuple[str, MetricValue]]] = {}
    for value in values:
        metric, clips, *measure = value.name.split(" / ")
        panels.setdefault("\n".join([metric, *measure]), []).append((clips, value))
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = _new_figure((5.5 * num_columns, 2.0 * num_rows))
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(grid.flat, panels.items()):
        for row, (_, value) in enumerate(lines):
            axes.plot([value.low, value.high], [row, row], linewidth=3, color="C0", alpha=0.5)
            axes.plot([value.value], [row], "o", color="C0")
        if lines[0][1].chance is not None:
            axes.axvline(lines[0][1].chance, linestyle="--", color="gray", linewidth=1)
        axes.set_yticks(range(len(lines)), [_title_line(clips)[:28] for clips, _ in lines], parse_math=False)
        axes.set(ylim=(len(lines) - 0.5, -0.5))
        axes.set_title("\n".join(_title_line(line) for line in title.split("\n")), fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7)
    _write_figure(figure, path)


def _class_ticks(classes: list[str]) -> tuple[list[float], list[str]]:
    """Return the middle and the name of each run of equal classes; runs that are too short for a label are left out."""
    middles, names = [], []
    start = 0
    for name, run in groupby(classes):
        length = len(list(run))
        if length >= _MIN_NAMED_SHARE * len(classes):
            middles.append(start + (length - 1) / 2)
            names.append(_title_line(name)[:28])
        start += length
    return middles, names
