"""Decides who plays what: turns an excerpt of a tune and the labels of a clip into MIDI events."""

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
# Programs and key velocities of the accompaniments; the velocities leave the melody in front.
CHORDS: dict[str, tuple[int, int]] = {"guitar chords": (24, 56), "piano chords": (0, 56), "string chords": (48, 56)}
# Semitones by which a register moves the melody.
REGISTERS: dict[str, int] = {"low": -12, "mid": 0, "high": 12}
# Quarters a minute; a clip's own tempo lies within `TEMPO_JITTER` of it.
TEMPI_BPM: dict[str, float] = {"slow": 66.0, "medium tempo": 108.0, "fast": 168.0}
TEMPO_JITTER = 0.06

MELODY_CHANNEL, _CHORD_CHANNEL = 0, 1
_ALL_SOUND_OFF = 120
_KICK, _SNARE, _CLOSED_HAT = 36, 38, 42
_KICK_VELOCITY, _SNARE_VELOCITY, _HAT_VELOCITY = 92, 79, 68
# A struck key is let go a little before the next one, as a player's finger is.
_HELD_FRACTION = 0.97


@dataclass(frozen=True)
class ClipLabels:
    """What is to be heard in a clip: the labels of the manifest that the sound depends on.

    Args:
        instrument: A key of `INSTRUMENTS`.
        tempo: A key of `TEMPI_BPM`.
        chords: A key of `CHORDS`, or None for no chords.
        drums: Whether a drum kit plays along.
        register: A key of `REGISTERS`.
        bpm: Quarters a minute.
    """

    instrument: str
    tempo: str
    chords: str | None
    drums: bool
    register: str
    bpm: float


def _excerpt(start_quarters: float, duration_quarters: float, bpm: float, seconds: float) -> tuple[float, float] | None:
    """(start, duration) in seconds of something on the page inside the clip, or None when it is outside."""
    seconds_per_quarter = 60.0 / bpm
    start = start_quarters * seconds_per_quarter
    end = min(seconds, start + duration_quarters * seconds_per_quarter)
    # A sliver of a note at the very end would be a click, not a note.
    return (start, end - start) if start >= 0 and end - start > 0.02 else None


def _drum_notes(tune: Tune, bpm: float, seconds: float) -> list[Note]:
    """Hi-hat on every eighth, bass and snare drum where the metre has them."""
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
        for pitch, velocity, places in voices:
            for place in places:
                span = _excerpt(bar * metre.quarters_per_bar + place, 0.25, bpm, seconds)
                if span is not None:
                    notes.append(Note(*span, pitch, velocity, DRUM_CHANNEL))
    return notes


@beartype
def perform(
    tune: Tune, labels: ClipLabels, start_bar: int, seconds: float, rng: Random
) -> list[Note | ProgramChange | ControlChange]:
    """Play an excerpt of a tune.

    Args:
        tune: What is played.
        labels: How it is played.
        start_bar: Bar of the tune at which the excerpt starts; the tune starts again from its first bar when it ends.
        seconds: Length of the excerpt; notes are cut there.
        rng: Source of the small differences of touch.

    Returns:
        MIDI events from 0 s on: programs first, and silence on every channel just after `seconds`.

    Raises:
        ValueError: If `start_bar` is not a bar of the tune.
    """
    if not 0 <= start_bar < tune.num_bars:
        raise ValueError(f"start_bar is {start_bar}, but the tune has bars 0..{tune.num_bars - 1}.")
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
