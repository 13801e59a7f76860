"""Bass, chords and drums of a bar, from the patterns of a style."""

from collections.abc import Sequence
from dataclasses import dataclass

from musiclm_pytorch.recipes.corpus.composition import ChordSpan
from musiclm_pytorch.recipes.corpus.instruments import CHORDS, DRUM_PITCHES, Accompaniment
from musiclm_pytorch.recipes.corpus.styles import Beat

__all__ = ["Hit", "bass_bar", "chord_bar", "drum_bar"]

LOWEST_BASS_PITCH = 28
BASS_VELOCITY = 80
# Factor on the velocity of each symbol that is a loud or a soft hit.
_LOUDNESS = {"X": 1.2, "o": 0.6}
_DRUM_VELOCITY = {"kick": 92, "snare": 79, "clap": 79, "hat": 66, "open": 62, "shaker": 58, "crash": 84}


@dataclass(frozen=True)
class Hit:
    """A note inside a bar, with start and duration in quarter notes from the start of the bar, and MIDI numbers."""

    start_quarters: float
    duration_quarters: float
    pitch: int
    velocity: int


def _steps(pattern: str, quarters: float) -> list[tuple[float, float, str]]:
    """List start, duration and symbol of every note of a pattern that fills a bar of `quarters` quarter notes."""
    step = quarters / len(pattern)
    hits: list[tuple[float, float, str]] = []
    for index, symbol in enumerate(pattern):
        if symbol == "-" and hits:
            start, duration, name = hits[-1]
            hits[-1] = (start, duration + step, name)
        elif symbol not in ".-":
            hits.append((index * step, step, symbol))
    return hits


def _chord_at(spans: Sequence[ChordSpan], quarters: float) -> ChordSpan:
    """Return the chord that sounds at a position in the bar; `spans` start at the first beat of the bar."""
    return [span for span in spans if span.start_quarters <= quarters + 1e-6][-1]


def bass_bar(pattern: str, quarters: float, spans: Sequence[ChordSpan], next_root: int) -> list[Hit]:
    """Create the notes of the bass.

    Args:
        pattern: Pattern in the notation of `styles`.
        quarters: Length of the bar.
        spans: Chords of the bar, with positions from the start of the bar.
        next_root: Root of the first chord of the next bar (MIDI pitch in any octave).
    """
    hits = []
    for start, duration, symbol in _steps(pattern, quarters):
        pitches = _chord_at(spans, start).pitches
        root = LOWEST_BASS_PITCH + (pitches[0] - LOWEST_BASS_PITCH) % 12
        if symbol == "a":
            goal = LOWEST_BASS_PITCH + (next_root - LOWEST_BASS_PITCH) % 12
            pitch = goal - 1 if goal > root else goal + 1
        else:
            pitch = root + {"r": 0, "t": pitches[1] - pitches[0], "f": pitches[2] - pitches[0], "o": 12}[symbol]
        hits.append(Hit(start, duration, pitch, BASS_VELOCITY))
    return hits


def _voicing(player: Accompaniment, pitches: Sequence[int]) -> list[int]:
    """Arrange the notes of a chord in the range of an instrument, from low to high."""
    lowest = player.lowest_pitch
    if player.power:
        root = lowest + (pitches[0] - lowest) % 12
        return [root, root + 7, root + 12]
    return sorted({lowest + (pitch - lowest) % 12 for pitch in pitches})


def chord_bar(
    chords: str, pattern: str, quarters: float, spans: Sequence[ChordSpan], restrike: bool = False
) -> list[Hit]:
    """Create the notes of an accompaniment; a sustained instrument plays the pattern only if `restrike`."""
    player = CHORDS[chords]
    hits = []
    if player.sustained and not restrike:
        steps = [(span.start_quarters, span.duration_quarters, "x") for span in spans]
    else:
        steps = _steps(pattern, quarters)
    for start, duration, symbol in steps:
        notes = _voicing(player, _chord_at(spans, start).pitches)
        if symbol.isdigit():
            octave, note = divmod(int(symbol) - 1, len(notes))
            hits.append(Hit(start, duration, notes[note] + 12 * octave, player.velocity + 6))
        else:
            velocity = round(player.velocity * _LOUDNESS.get(symbol, 1.0))
            hits.extend(Hit(start, duration, note, velocity) for note in notes)
    return hits


def drum_bar(beat: Beat, quarters: float) -> list[Hit]:
    """Create the drum hits of a bar."""
    return [
        Hit(start, 0.25, DRUM_PITCHES[voice], round(_DRUM_VELOCITY.get(voice, 72) * _LOUDNESS.get(symbol, 1.0)))
        for voice, pattern in beat.items()
        for start, _, symbol in _steps(pattern, quarters)
    ]
