"""A picture of a sound: wave and mel spectrogram (matplotlib, extra [plot])."""

from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.saving.files import staged_files

__all__ = ["PICTURE_SUFFIXES", "new_figure", "one_line", "plot_wave", "require_matplotlib", "write_figure"]

PICTURE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "musiclm-pytorch[plot]"') from error


def new_figure(inches: tuple[float, float]) -> Any:
    """A figure of our own, which no display and no global state of matplotlib knows of."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a picture, whole or not at all; the suffix chooses the format."""
    path = Path(path)
    with staged_files(path.parent) as stage:
        figure.savefig(stage / path.name, dpi=dpi)


def one_line(text: str) -> str:
    """One line that can be drawn: lone surrogates (broken shell input) have no glyph."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())


@beartype
def plot_wave(wave: Tensor, sample_hz: int, path: str | Path, title: str = "") -> None:
    """Draw wave and log-mel spectrogram into a picture file.

    Args:
        wave: Samples `[n]` in [-1, 1].
        sample_hz: Their rate (Hz).
        path: Picture to write; the suffix chooses the format.
        title: Line above the picture.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = new_figure((9, 5))
    seconds = wave.shape[-1] / sample_hz
    mel = MelSpectrogram(sample_hz=sample_hz, n_fft=1024, hop_length=256, num_mels=80)(wave)
    decibel = 20 * mel.clamp(min=1e-5).log10()
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    top.plot(torch.linspace(0, seconds, wave.shape[-1]), wave, linewidth=0.4)
    top.set(ylabel="amplitude", ylim=(-1, 1))
    # Plain text, whatever it holds: "$" would begin a formula.
    top.set_title(one_line(title)[:90], parse_math=False)
    bottom.imshow(
        decibel,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, len(decibel)),
        vmin=float(decibel.max()) - 80,
        cmap="magma",
    )
    bottom.set(xlabel="seconds", ylabel="mel band")
    write_figure(figure, path, dpi=100)
