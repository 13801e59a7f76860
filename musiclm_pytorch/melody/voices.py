"""Synthetic voices that play melodies: hums, whistles, sines, and plucked, blown and bowed instruments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from musiclm_pytorch.melody.notes import PitchNote

__all__ = ["KINDS", "Voice", "draw_voice", "render_melody"]

_RELEASE_SECONDS = 0.02
_MAX_HARMONICS = 12
_A4_PITCH, _A4_HZ = 69, 440.0

Kind = Literal["sine", "whistle", "hum", "plucked", "blown", "bowed"]
KINDS: tuple[Kind, ...] = ("sine", "whistle", "hum", "plucked", "blown", "bowed")
# Lowest MIDI pitches of the octave that a voice plays.
_LOWEST_PITCHES: dict[Kind, tuple[int, int]] = {
    "sine": (45, 84),
    "whistle": (72, 86),
    "hum": (40, 62),
    "plucked": (40, 78),
    "blown": (45, 80),
    "bowed": (40, 80),
}


@dataclass(frozen=True)
class Voice:
    """Sound of a monophonic voice.

    Attributes:
        lowest_pitch: MIDI pitch of the lowest note; every note lies in the octave from here upwards.
        amplitudes: Amplitude of every harmonic.
        decay_seconds: Time after which a note has decayed to 1/e; infinity = a sustained note.
        glide_seconds: Time in which the pitch moves from one note to the next.
        breath: Level of noise, relative to the tone.
        detune_cents: Deviation of all notes.
    """

    lowest_pitch: int
    amplitudes: tuple[float, ...]
    attack_seconds: float
    decay_seconds: float
    vibrato_cents: float
    vibrato_hz: float
    glide_seconds: float
    breath: float
    detune_cents: float


def draw_voice(rng: np.random.Generator, kind: Kind | None = None) -> Voice:
    """Draw a random voice of a kind; None = a random kind."""
    kind = KINDS[rng.integers(len(KINDS))] if kind is None else kind
    orders = np.arange(1, 1 + (1 if kind == "sine" else 2 if kind == "whistle" else _MAX_HARMONICS))
    amplitudes = orders ** -rng.uniform(0.5, 3.0) * rng.uniform(0.2, 1.0, len(orders))
    if kind == "whistle":
        amplitudes[1] *= 0.1
    elif kind in ("plucked", "blown") and rng.random() < 0.3:  # as a clarinet
        amplitudes[1::2] *= 0.1
    amplitudes[0] = max(amplitudes[0], 0.3 * amplitudes.max())
    is_voice = kind in ("hum", "whistle")
    return Voice(
        lowest_pitch=int(rng.integers(*_LOWEST_PITCHES[kind])),
        amplitudes=tuple(amplitudes),
        attack_seconds=rng.uniform(0.003, 0.02) if kind == "plucked" else rng.uniform(0.01, 0.07),
        decay_seconds=rng.uniform(0.15, 1.5) if kind == "plucked" else np.inf,
        vibrato_cents=rng.uniform(0, 50) if kind in ("hum", "whistle", "bowed") else rng.uniform(0, 15),
        vibrato_hz=rng.uniform(4, 7),
        glide_seconds=rng.uniform(0.02, 0.08) if is_voice else 0.002,
        breath=rng.uniform(0.0, 0.15) if is_voice or kind == "blown" else rng.uniform(0, 0.01),
        detune_cents=rng.uniform(-25, 25) if is_voice else rng.uniform(-8, 8),
    )


def render_melody(
    melody: Sequence[PitchNote], seconds: float, sample_hz: int, voice: Voice, rng: np.random.Generator
) -> np.ndarray:
    """Render a melody to a wave `[n]` float32 with a largest absolute sample of 0.5; the random numbers are noise."""
    num_samples = round(seconds * sample_hz)
    pitches, envelope = np.full(num_samples, np.nan), np.zeros(num_samples)
    for number, note in enumerate(melody):
        start, stop = round(note.start_seconds * sample_hz), round(note.end_seconds * sample_hz)
        if number + 1 < len(melody):
            stop = min(stop, round(melody[number + 1].start_seconds * sample_hz))
        times = np.arange(max(0, min(stop, num_samples) - start)) / sample_hz
        level = np.exp(-times / voice.decay_seconds) * np.minimum(1, times / voice.attack_seconds)
        pitches[start : start + len(times)] = voice.lowest_pitch + (note.pitch_class - voice.lowest_pitch) % 12
        envelope[start : start + len(times)] = level * np.minimum(1, (times[::-1]) / _RELEASE_SECONDS)
    if not envelope.any():
        return np.zeros(num_samples, dtype=np.float32)
    # The pitch of a rest is that of the note before it, at the beginning that of the first note.
    known = np.maximum.accumulate(np.where(np.isnan(pitches), -1, np.arange(num_samples)))
    pitches = pitches[np.where(known < 0, np.flatnonzero(~np.isnan(pitches))[0], known)]
    width = max(1, round(voice.glide_seconds * sample_hz))
    padded = np.pad(pitches, (width // 2, width - 1 - width // 2), mode="edge")
    sums = np.cumsum(np.concatenate([[0.0], padded]))
    pitches = (sums[width:] - sums[:-width]) / width
    times = np.arange(num_samples) / sample_hz
    cents = voice.detune_cents + voice.vibrato_cents * np.sin(2 * np.pi * voice.vibrato_hz * times)
    hz = _A4_HZ * 2 ** ((pitches - _A4_PITCH + cents / 100) / 12)
    phase = 2 * np.pi * np.cumsum(hz) / sample_hz
    wave = np.zeros(num_samples)
    for order, amplitude in enumerate(voice.amplitudes, start=1):
        if order * hz.min() < sample_hz / 2:
            wave += amplitude * np.sin(order * phase) * (order * hz < 0.48 * sample_hz)
    noise = rng.standard_normal(num_samples) * voice.breath * np.abs(wave).max()
    wave = (wave + noise) * envelope
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)
