"""Melodies that condition MusicGen: waves, files, stems of a separator, notes and chroma vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.waves import check_samples, with_channels
from audiolm_pytorch.generation.prompts import read_prompt
from audiolm_pytorch.generation.request import Prompt
from musiclm_pytorch.musicgen.chroma import ChromaConditioner

__all__ = ["Melody", "MelodyInput", "Stems", "melody_of", "melody_of_stems"]

# Notes of one item: MIDI pitch, start and end in seconds.
Notes = Sequence[Sequence[float]]
# Waves `[n]`, `[b, n]` or `[b, c, n]`, chroma vectors `[f, 12]`, a file, notes, or one of them or None per item.
MelodyInput = Prompt | np.ndarray | Notes | Sequence[Prompt | np.ndarray | Notes | None]
# Wave `[n]` or `[c, n]` or file of every stem by name, for one item or per item.
Stems = Mapping[str, Prompt | np.ndarray] | Sequence[Mapping[str, Prompt | np.ndarray] | None]

_ACCOMPANIMENT = ("drums", "bass")
_MIDDLE_C_HZ = 261.6256
_NOTE_AMPLITUDE = 0.1


@dataclass(frozen=True, eq=False)
class Melody:
    """Melody of one item: a mono wave `[n]` at the rate of the `ChromaConditioner`, or chroma vectors `[f, 12]`."""

    wave: Tensor | None = None
    frames: Tensor | None = None

    def window(self, chroma: ChromaConditioner, start_seconds: float | None) -> Tensor:
        """Return the condition `[num_frames, 12]` of a window.

        The melody is moved to the start of the window, and repeated to the end of the window. With
        `start_seconds=None`, the music has only one window, and the frames of a short melody are repeated instead.
        """
        if self.frames is not None:
            hop_seconds = chroma.hop_samples / chroma.sample_hz
            first = 0 if start_seconds is None else round(start_seconds / hop_seconds)
            return chroma.expand(self.frames.roll(-first, dims=0).unsqueeze(0))[0]
        wave = torch.zeros(1) if self.wave is None else self.wave
        longest = (chroma.num_frames - 1) * chroma.hop_samples + chroma.hop_samples // 2
        if start_seconds is None:
            return chroma(wave[: longest + chroma.n_fft])[0]  # with the samples after the last frame
        places = round(start_seconds * chroma.sample_hz) + torch.arange(longest)
        return chroma(wave[places % len(wave)])[0]


def melody_of(item: Any, sample_hz: int, chroma: ChromaConditioner, name: str) -> Melody:
    """Return the melody of one item of a `MelodyInput`; `sample_hz` is the rate of waves without a rate."""
    if isinstance(item, Tensor) and not item.numel():
        raise ValueError(f"{name} is empty; pass a longer melody, or None for no melody")
    if is_chroma(item):
        check_samples(item, name)
        return Melody(frames=item.float())
    if isinstance(item, (list, tuple)):
        return Melody(wave=_wave_of_notes(item, chroma.sample_hz, name))
    return Melody(wave=_mono(item, sample_hz, chroma, name))


def melody_of_stems(
    stems: Mapping[str, Prompt | np.ndarray], sample_hz: int, chroma: ChromaConditioner, name: str
) -> Melody:
    """Return the melody of the sum of all stems except drums and bass, as in the training of MusicGen."""
    names = [stem for stem in stems if stem not in _ACCOMPANIMENT]
    if not names:
        raise ValueError(f"{name} need a stem other than {' and '.join(_ACCOMPANIMENT)}, got {sorted(stems)}")
    waves = [_mono(stems[stem], sample_hz, chroma, f"{name}, {stem},") for stem in names]
    lengths = [len(wave) for wave in waves]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"{name} must have equal lengths above 0, got {dict(zip(names, lengths))} samples")
    return Melody(wave=torch.stack(waves).sum(dim=0))


def is_chroma(item: Any) -> bool:
    """Whether an item contains chroma vectors `[f, 12]`."""
    return isinstance(item, Tensor) and item.ndim == 2 and item.shape[1] == ChromaConditioner.num_classes


def are_notes(item: Any) -> bool:
    """Whether an item is a list of notes."""
    return isinstance(item, (list, tuple)) and all(
        isinstance(note, (list, tuple)) and all(isinstance(number, Real) for number in note) for note in item
    )


def _mono(wave: Any, sample_hz: int, chroma: ChromaConditioner, name: str) -> Tensor:
    """Read a wave or a file as a mono wave `[n]` at the rate of the chroma."""
    wave, hz = read_prompt(torch.from_numpy(wave) if isinstance(wave, np.ndarray) else wave, sample_hz, name)
    return resample(with_channels(wave, 1, name), hz, chroma.sample_hz)[0].float()


def _wave_of_notes(notes: Notes, sample_hz: int, name: str) -> Tensor:
    """Play the pitch classes of notes as sines in the octave of middle C."""
    for note in notes:
        is_note = len(note) == 3 and 0 <= note[0] <= 127 and 0 <= note[1] < note[2] < float("inf")
        if not is_note:
            raise ValueError(
                f"a note of {name} must be (pitch, start_seconds, end_seconds) with a MIDI pitch in 0..127 and "
                f"0 <= start < end, got {tuple(note)}"
            )
    if not notes:
        raise ValueError(f"{name} has no notes; pass notes, or None for no melody")
    wave = torch.zeros(max(1, round(max(note[2] for note in notes) * sample_hz)))
    for pitch, start, end in notes:
        samples = slice(round(start * sample_hz), round(end * sample_hz))
        phase = 2 * torch.pi * _MIDDLE_C_HZ * 2 ** (pitch % 12 / 12) / sample_hz
        wave[samples] += _NOTE_AMPLITUDE * torch.sin(phase * torch.arange(len(wave[samples]), dtype=torch.float64))
    return wave
