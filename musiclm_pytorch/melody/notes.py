"""Melodies as notes of known pitch class, which are read from the labels of audio files."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from audiolm_pytorch.data.items import AudioItem

__all__ = ["LABEL", "PITCH_CLASSES", "PitchNote", "excerpt_of", "notes_of", "pitch_classes_at"]

LABEL = "pitch_class"
PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


class PitchNote(NamedTuple):
    """A note of a melody; `pitch_class` is 0..11 from C."""

    start_seconds: float
    end_seconds: float
    pitch_class: int


def notes_of(item: AudioItem) -> list[PitchNote] | None:
    """Read the notes in the label `pitch_class` of a file, a list of `[start_seconds, end_seconds, name]`.

    The names are those in `PITCH_CLASSES`. A note that lasts longer than the file is cut. A file without the label, or
    without notes, returns None.
    """
    rows = item.labels.get(LABEL)
    if not rows:
        return None
    notes = []
    try:
        for start, end, name in rows:
            notes.append(PitchNote(float(start), float(end), PITCH_CLASSES.index(name)))
    except (TypeError, ValueError):
        notes = []
    starts = [note.start_seconds for note in notes]
    is_valid = notes and starts == sorted(starts) and all(0 <= start < end for start, end, _ in notes)
    if not is_valid:
        raise ValueError(
            f"{item.path}: {LABEL} must be a list of [start_seconds, end_seconds, name] in order of time, with names "
            f"such as C or F#, got {rows!r:.100}"
        )
    seconds = item.num_samples / item.sample_hz
    if starts[-1] >= seconds:
        raise ValueError(
            f"{item.path}: {LABEL} has a note that starts at {starts[-1]:g} s, but the file ends at {seconds:g} s; "
            "correct the label, whose times are in seconds"
        )
    return [note._replace(end_seconds=min(note.end_seconds, seconds)) for note in notes]


def excerpt_of(
    melody: Sequence[PitchNote], start_seconds: float, seconds: float, speed: float = 1.0
) -> list[PitchNote]:
    """Return the part of a melody that begins at `start_seconds` and lasts `seconds`, played `speed` times as fast.

    Notes that reach over the start or the end are cut.
    """
    cut = [
        (max(note.start_seconds - start_seconds, 0.0), min(note.end_seconds - start_seconds, seconds), note.pitch_class)
        for note in melody
    ]
    return [PitchNote(start / speed, end / speed, name) for start, end, name in cut if start < end]


def pitch_classes_at(melody: Sequence[PitchNote], times_seconds: np.ndarray) -> np.ndarray:
    """Return the pitch class 0..11 at each time, with the shape of `times_seconds`; -1 = no note."""
    starts, ends, classes = np.array(melody, dtype=np.float64).reshape(-1, 3).T
    index = np.searchsorted(starts, times_seconds, side="right") - 1
    if not len(starts):
        return np.full(times_seconds.shape, -1)
    sounds = (index >= 0) & (times_seconds < ends[index])
    return np.where(sounds, classes[index].astype(np.int64), -1)
