"""Reading of clips and labels that are listed in a manifest."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem

__all__ = ["label_text", "labels_of", "load_clips"]


@typed
def load_clips(items: Sequence[AudioItem], sample_hz: int, seconds: float = 5.0) -> Tensor:
    """Read the first `seconds` of audio files as one mono batch `[b, n]`; shorter files are padded with silence."""
    if not items:
        raise ValueError("got an empty list of clips; pass at least one clip")
    num_samples = round(seconds * sample_hz)
    waves = [item.read(sample_hz, duration_seconds=seconds)[0, :num_samples] for item in items]
    return torch.stack([F.pad(wave, (0, num_samples - len(wave))) for wave in waves])


@typed
def labels_of(items: Sequence[AudioItem], name: str) -> list[str]:
    """Return the value of the label called `name` of every item as text (see `label_text`)."""
    missing = [item.path for item in items if item.labels.get(name) is None]
    if missing:
        raise ValueError(f"{len(missing)} of {len(items)} clips have no label {name!r}, such as {missing[0]}; add it")
    return [label_text(item.labels[name]) for item in items]


def label_text(label: object) -> str:
    """Return the value of a label as text; booleans become "yes" and "no"."""
    return ("yes" if label else "no") if isinstance(label, bool) else str(label)
