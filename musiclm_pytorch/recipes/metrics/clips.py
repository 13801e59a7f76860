"""Labelled clips of a data set, read to one length and one rate, in the order of their manifest."""

from collections.abc import Sequence

import torch
from beartype import beartype
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.data.manifest import AudioItem

__all__ = ["load_clips", "labels_of"]


@beartype
def load_clips(items: Sequence[AudioItem], sample_hz: int, seconds: float | int = 5.0) -> Tensor:
    """Read the beginnings of audio files as one batch.

    Args:
        items: Files of a manifest.
        sample_hz: Rate wanted (Hz).
        seconds: Length wanted; shorter files are filled with silence.

    Returns:
        `[b, n]` float32, mono, `n = round(seconds * sample_hz)`.

    Raises:
        ValueError: If there are no items, or a file cannot be read.
    """
    if not items:
        raise ValueError("no clips to read")
    num_samples = round(seconds * sample_hz)
    waves = [read_audio(item.path, sample_hz, duration_seconds=seconds)[0][0, :num_samples] for item in items]
    return torch.stack([F.pad(wave, (0, num_samples - len(wave))) for wave in waves])


@beartype
def labels_of(items: Sequence[AudioItem], name: str) -> list[str]:
    """Read one label of every item as text; truth values become "yes" and "no".

    Args:
        items: Files of a manifest.
        name: A field of the manifest, such as "instrument".

    Returns:
        One string per item.

    Raises:
        ValueError: If an item has no such label; it is named.
    """
    lacking = [item.path for item in items if item.labels.get(name) is None]
    if lacking:
        raise ValueError(f"{len(lacking)} of {len(items)} clips have no label {name!r}; the first is {lacking[0]}")
    values = (item.labels[name] for item in items)
    return [("yes" if value else "no") if isinstance(value, bool) else str(value) for value in values]
