"""Conversion of an excerpt of a tune to MIDI events; the labels of the clip set the instruments and the tempo."""

from dataclasses import dataclass
from random import Random

from beartype import beartype

from musiclm_pytorch.recipes.corpus.composition import Tune
from musiclm_pytorch.recipes.corpus.midi import DRUM_CHANNEL, ControlChange, Note, ProgramChange

__all__ = ["CHORDS", "INSTRUMENTS", "MELODY_CHANNEL", "REGISTERS", "TEMPI_BPM", "ClipLabels", "perform"]

# General MIDI programs (counted from 0) of the melody instruments.
INSTRUMENTS: dict[str, int] = {
    "accordion": 21,
    "acoustic guitar": 24,
    "cello": 42,
    "choir": 52,
    "church organ": 19,
    "clarinet": 71,
    "distorted electric guitar": 30,
    "flute": 73,
    "harpsichord": 6,
    "marimba": 12,
    "music box": 10,
    "piano": 0,
    "trumpet": 56,
    "violin": 40,
}
# Programs and velocities of the accompaniments; they are softer than the melody.
CHORDS: dict[str, tuple[int, int]] = {"guitar chords": (24, 56), "piano chords": (0, 56), "string chords": (48, 56)}
# Transposition of the melody by register, in semitones.
REGISTERS: dict[str, int] = {"low": -12, "mid": 0, "high": 12}
# Quarters per minute; the tempo of a clip differs from it by at most the share `TEMPO_JITTER`.
TEMPI_BPM: dict[str, float] = {"slow": 66.0, "medium tempo": 108.0, "fast": 168.0}
TEMPO_JITTER = 0.06

MELODY_CHANNEL, _CHORD_CHANNEL = 0, 1
_ALL_SOUND_OFF = 120
_KICK, _SNARE, _CLOSED_HAT = 36, 38, 42
_KICK_VELOCITY, _SNARE_VELOCITY, _HAT_VELOCITY = 92, 79, 68
# Share of the written duration for which a key is held.
_HELD_FRACTION = 0.97


@dataclass(frozen=True)
class ClipLabels:
    """Labels of a clip that determine its instruments, tempo and pitch range.

    Args:
        instrument: Instrument of the melody, a key of `INSTRUMENTS`.
        tempo: Name of the tempo, a key of `TEMPI_BPM`.
        chords: Instrument of the chords, a key of `CHORDS`; None = no chords.
        drums: Whether the clip has drums.
        register: Pitch range of the melody, a key of `REGISTERS`.
        bpm: Tempo in quarter notes per minute.
    """

    instrument: str
    tempo: str
    chords: str | None
    drums: bool
    register: str
    bpm: float


def _excerpt(start_quarters: float, duration_quarters: float, bpm: float, seconds: float) -> tuple[float, float] | None:
    """Compute start and duration in seconds of a note in a clip; return None for a note outside the clip."""
    seconds_per_quarter = 60.0 / bpm
    start = start_quarters * seconds_per_quarter
    end = min(seconds, start + duration_quarters * seconds_per_quarter)
    # A very short rest of a note at the end would sound like a click.
    return (start, end - start) if start >= 0 and end - start > 0.02 else None


def _drum_notes(tune: Tune, bpm: float, seconds: float) -> list[Note]:
    """Create drum notes, with a hi-hat on every eighth note, and bass and snare drum as in `tune.metre`."""
    metre = tune.metre
    num_bars = int(seconds * bpm / 60.0 / metre.quarters_per_bar) + 1
    eighths = [eighth / 2 for eighth in range(round(metre.quarters_per_bar * 2))]
    voices = (
        (_KICK, _KICK_VELOCITY, metre.kick),
        (_SNARE, _SNARE_VELOCITY, metre.snare),
        (_CLOSED_HAT, _HAT_VELOCITY, eighths),
    )
    notes = []
    for bar in range(num_bars):
        for pitch, velocity, positions in voices:
            for position in positions:
                span = _excerpt(bar * metre.quarters_per_bar + position, 0.25, bpm, seconds)
                if span is not None:
                    notes.append(Note(*span, pitch, velocity, DRUM_CHANNEL))
    return notes


@beartype
def perform(
    tune: Tune, labels: ClipLabels, start_bar: int, seconds: float, rng: Random
) -> list[Note | ProgramChange | ControlChange]:
    """Create the MIDI events of an excerpt of a tune; all sound stops shortly after `seconds`.

    Args:
        tune: Tune to play; an excerpt that reaches the last bar continues at the first bar.
        labels: Instrument, tempo, accompaniment and register of the clip.
        start_bar: First bar of the excerpt.
        seconds: Length of the excerpt; notes are cut at the end.
        rng: Random generator of small differences in loudness.
    """
    if not 0 <= start_bar < tune.num_bars:
        raise ValueError(f"start_bar must be in 0..{tune.num_bars - 1}, got {start_bar}")
    events: list[Note | ProgramChange | ControlChange] = [
        ProgramChange(0.0, INSTRUMENTS[labels.instrument], MELODY_CHANNEL)
    ]
    first = start_bar * tune.metre.quarters_per_bar
    shift = REGISTERS[labels.register]
    for lap in (0.0, tune.quarters):
        for note in tune.notes:
            span = _excerpt(
                note.start_quarters + lap - first, note.duration_quarters * _HELD_FRACTION, labels.bpm, seconds
            )
            if span is not None:
                velocity = rng.randint(96, 104) if note.strong else rng.randint(88, 98)
                events.append(Note(*span, note.pitch + shift, velocity, MELODY_CHANNEL))
        if labels.chords is None:
            continue
        program, velocity = CHORDS[labels.chords]
        events.append(ProgramChange(0.0, program, _CHORD_CHANNEL))
        for chord in tune.chords:
            span = _excerpt(
                chord.start_quarters + lap - first, chord.duration_quarters * _HELD_FRACTION, labels.bpm, seconds
            )
            if span is not None:
                events.extend(Note(*span, pitch, velocity, _CHORD_CHANNEL) for pitch in chord.pitches)
    if labels.drums:
        events.extend(_drum_notes(tune, labels.bpm, seconds))
    silence = seconds + 0.05
    events.extend(
        ControlChange(silence, _ALL_SOUND_OFF, 0, channel) for channel in (MELODY_CHANNEL, _CHORD_CHANNEL, DRUM_CHANNEL)
    )
    return events
