"""Random composition of folk tunes and of songs, in phrases of four bars of melody over a chord progression.

The first phrase of a part ends with an open cadence, which needs a continuation. The next phrases repeat the first
two bars of the first phrase, and the last phrase ends on the tonic. Notes on strong beats belong to the chord; other
notes move along the scale or the chord. A repeated motif is transposed along the scale to the new chord.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.recipes.corpus.dances import DANCES, Metre
from musiclm_pytorch.recipes.corpus.styles import Progression, Style
from musiclm_pytorch.recipes.corpus.theory import (
    CADENCES,
    KEYS,
    NAMED_SCALES,
    OPENINGS,
    SCALES,
    Chord,
    Scale,
    parse_phrases,
)

__all__ = ["ChordSpan", "MelodyNote", "Tune", "compose_song", "compose_tune"]

# Range of melodies in the middle register, and the pitch that they tend to (MIDI).
LOWEST_PITCH, CENTRE_PITCH, HIGHEST_PITCH = 61, 72, 83
# Roots of accompanying chords are in the octave from here (C2, 65.4 Hz) upwards, in every register of the melody.
LOWEST_CHORD_ROOT = 36

# Share of tunes in which the chord is repeated inside a bar.
BUSY_FRACTION = 0.4

# Motif of each bar of a phrase; z and y are cadences.
_PHRASE_PLANS = ("abaz", "aabz", "abcz", "abbz")
_SONG_FORMS = ("AABA", "ABAB", "AABB")


@dataclass(frozen=True)
class MelodyNote:
    """A melody note, with start and duration in quarter notes, MIDI pitch, and a flag for strong beats."""

    start_quarters: float
    duration_quarters: float
    pitch: int
    strong: bool


@dataclass(frozen=True)
class ChordSpan:
    """A chord of the accompaniment, with start and duration in quarter notes, and MIDI pitches (root first)."""

    start_quarters: float
    duration_quarters: float
    pitches: tuple[int, ...]


@dataclass(frozen=True)
class Tune:
    """A composed tune with melody, chords, scale and rhythm.

    Args:
        style: Name of the dance or style.
        mode: "major" or "minor".
        scale: Scale of the melody and the chords.
        metre: Rhythms and drum positions of every bar.
        num_bars: Length of the tune in bars.
        notes: Notes of the melody in order of time, in the middle register; every bar begins with a new note.
        chords: Chords of the accompaniment in order of time, without gaps.
    """

    style: str
    mode: str
    scale: Scale
    metre: Metre
    num_bars: int
    notes: tuple[MelodyNote, ...]
    chords: tuple[ChordSpan, ...]

    @property
    def quarters(self) -> float:
        """Length of the tune in quarter notes."""
        return self.num_bars * self.metre.quarters_per_bar


@dataclass(frozen=True)
class _Bar:
    """A bar of the melody, with the rhythm, the chord and the scale degrees of each group of notes."""

    rhythms: tuple[tuple[float, ...], ...]
    chords: tuple[Chord, ...]
    degrees: tuple[tuple[int, ...], ...]


_Choice = TypeVar("_Choice")


def _pick(rng: Random, weighted: dict[_Choice, float]) -> _Choice:
    """Draw a random key of a dictionary whose values are the weights of the keys."""
    return rng.choices(list(weighted), weights=list(weighted.values()))[0]


class _Composer:
    """Random composer of the bars of one tune."""

    def __init__(self, scale: Scale, mode: str, metre: Metre, rng: Random) -> None:
        self.scale, self.mode, self.metre, self.rng = scale, mode, metre, rng
        degrees = [degree for degree in range(-14, 21) if LOWEST_PITCH <= scale.pitch(degree) <= HIGHEST_PITCH]
        self.lowest, self.highest = degrees[0], degrees[-1]
        self.centre = min(degrees, key=lambda degree: abs(scale.pitch(degree) - CENTRE_PITCH))
        self.last = self.centre

    def part(self, phrases: Sequence[Sequence[tuple[Chord, ...]]]) -> list[_Bar]:
        """Compose phrases of four bars over chords; later phrases repeat two bars, and the last ends on the tonic."""
        rng = self.rng
        plan = rng.choice(_PHRASE_PLANS)
        bars = self._phrase(phrases[0], plan, {}, closed=len(phrases) == 1)
        # `reversed` keeps the first occurrence of each motif.
        motifs = dict(zip(reversed(plan), reversed(bars), strict=True))
        for number, phrase in enumerate(phrases[1:], start=2):
            answer_plan = plan[:2] + rng.choice(("a", "b", "d")) + "y"
            bars += self._phrase(phrase, answer_plan, motifs, closed=number == len(phrases))
        return bars

    def folk_phrases(self) -> list[list[tuple[Chord, ...]]]:
        """Draw the chords of two phrases; the first phrase has an open cadence, the second ends on the tonic."""
        opening = self.rng.choice(OPENINGS[self.mode])
        return [[*opening, *self.rng.choice(CADENCES[self.mode, ending])] for ending in ("open", "closed")]

    def _phrase(
        self, harmony: Sequence[tuple[Chord, ...]], plan: str, motifs: dict[str, _Bar], closed: bool
    ) -> list[_Bar]:
        bars = []
        for position, (motif, names) in enumerate(zip(plan, harmony, strict=True)):
            chords = self._chords_of_groups(names)
            if position == len(plan) - 1:
                bar = self._cadence(chords, closed)
            else:
                bar = (
                    self._returning(motifs[motif], chords)
                    if motif in motifs
                    else self._new_bar(self._rhythms(motifs), chords)
                )
                motifs.setdefault(motif, bar)
            self.last = bar.degrees[-1][-1]
            bars.append(bar)
        return bars

    def _chords_of_groups(self, names: tuple[Chord, ...]) -> tuple[Chord, ...]:
        """Select one of the chords `names` for each group of notes in a bar; a bar of one group has the last chord."""
        count = len(self.metre.groups)
        if count == 1:
            return (names[-1],)
        return tuple(names[min(group * len(names) // count, len(names) - 1)] for group in range(count))

    def _rhythms(self, motifs: dict[str, _Bar]) -> tuple[tuple[float, ...], ...]:
        """Draw the rhythm of a bar, which is often the rhythm of an earlier bar of the phrase."""
        if motifs and self.rng.random() < 0.4:
            return self.rng.choice(list(motifs.values())).rhythms
        return tuple(_pick(self.rng, self.metre.figures) for _ in self.metre.groups)

    def _new_bar(
        self, rhythms: tuple[tuple[float, ...], ...], chords: tuple[Chord, ...], end: int | None = None
    ) -> _Bar:
        """Compose a bar in which every group of notes starts on a chord tone; the last group starts on degree `end`."""
        anchors: list[int] = []
        for chord in chords:
            anchors.append(self._anchor(chord, anchors[-1] if anchors else self.last))
        if end is not None:
            anchors[-1] = end
        degrees = []
        for group, (rhythm, chord) in enumerate(zip(rhythms, chords, strict=True)):
            target = anchors[group + 1] if group + 1 < len(anchors) else None
            degrees.append(self._walk(anchors[group], target, len(rhythm), chord))
        return _Bar(rhythms, chords, tuple(degrees))

    def _anchor(self, chord: Chord, near: int) -> int:
        """Draw a chord tone close to the degree `near` and to the middle of the pitch range."""
        tones = [degree for degree in range(self.lowest, self.highest + 1) if chord.has(degree)]
        weights = [
            math.exp(-abs(tone - near) / 1.6 - abs(tone - self.centre) / 5.0) * (0.4 if tone == near else 1.0)
            for tone in tones
        ]
        return self.rng.choices(tones, weights=weights)[0]

    def _walk(self, start: int, target: int | None, length: int, chord: Chord) -> tuple[int, ...]:
        """Draw a melody of `length` scale degrees that begins at the degree `start` and moves towards `target`."""
        degrees = [start]
        for left in range(length - 1, 0, -1):
            here = degrees[-1]
            moves, weights = [], []
            for move, step_weight, chord_weight in (
                (1, 5.0, 5.0),
                (2, 0.6, 3.0),
                (3, 0.0, 1.2),
                (4, 0.0, 0.6),
                (0, 0.2, 0.6),
            ):
                for degree in {here + move, here - move}:
                    if self.lowest <= degree <= self.highest:
                        weight = chord_weight if chord.has(degree) else step_weight
                        too_far = 0.0 if target is None else max(0.0, abs(target - degree) - 1.4 * left)
                        pull = abs(degree - self.centre) / 8.0
                        moves.append(degree)
                        weights.append(weight * math.exp(-1.5 * too_far - pull))
            degrees.append(self.rng.choices(moves, weights=weights)[0])
        return tuple(degrees)

    def _returning(self, motif: _Bar, chords: tuple[Chord, ...]) -> _Bar:
        """Transpose a motif along the scale to new chords; keep only the rhythm if no transposition is possible."""
        shift = (chords[0].degree - motif.chords[0].degree) % 7
        notes = [degree for group in motif.degrees for degree in group]
        shifts = [shift + octave for octave in (-14, -7, 0) if min(notes) + shift + octave >= self.lowest]
        shifts = [move for move in shifts if max(notes) + move <= self.highest]
        fits = all((new.degree - old.degree) % 7 == shift for new, old in zip(chords, motif.chords, strict=True))
        if not shifts or not fits:
            return self._new_bar(motif.rhythms, chords)
        move = min(shifts, key=abs)
        return _Bar(motif.rhythms, chords, tuple(tuple(degree + move for degree in group) for group in motif.degrees))

    def _cadence(self, chords: tuple[Chord, ...], closed: bool) -> _Bar:
        """Compose the last bar of a phrase, which leads to the tonic if `closed`, or else to the root of the chord."""
        rhythms = self.rng.choice(self.metre.closing)
        goal = 0 if closed and chords[-1].has(0) else chords[-1].degree
        homes = [degree for degree in range(self.lowest, self.highest + 1) if degree % 7 == goal]
        return self._new_bar(rhythms, chords, end=min(homes, key=lambda degree: abs(degree - self.last)))


def _score(
    bars: list[_Bar], scale: Scale, metre: Metre, busy: bool, chord_size: int = 3
) -> tuple[list[MelodyNote], list[ChordSpan]]:
    """Convert composed bars to notes and chords. If `busy` is True, every group of notes repeats the chord."""
    notes: list[MelodyNote] = []
    spans: list[ChordSpan] = []
    for index, bar in enumerate(bars):
        position = index * metre.quarters_per_bar
        for group, (rhythm, chord, degrees) in enumerate(zip(bar.rhythms, bar.chords, bar.degrees, strict=True)):
            if busy or group == 0 or chord != bar.chords[group - 1]:
                spans.append(
                    ChordSpan(position, metre.groups[group], scale.chord(chord, LOWEST_CHORD_ROOT, chord_size))
                )
            else:
                spans[-1] = ChordSpan(
                    spans[-1].start_quarters, spans[-1].duration_quarters + metre.groups[group], spans[-1].pitches
                )
            start = position
            for number, (duration, degree) in enumerate(zip(rhythm, degrees, strict=True)):
                if duration > 0:
                    notes.append(MelodyNote(start, duration, scale.pitch(degree, chord.leading), number == 0))
                start += abs(duration)
            position += metre.groups[group]
    return notes, spans


def _dense(metre: Metre, density: float) -> Metre:
    """Multiply the weight of every rhythm by `density` per note."""
    figures = {figure: weight * density ** sum(step > 0 for step in figure) for figure, weight in metre.figures.items()}
    return replace(metre, figures=figures)


@typed
def compose_tune(dance: str, mode: str, rng: Random, density: float = 1.0) -> Tune:
    """Compose a tune of 32 bars from two eight-bar parts A and B, in an order such as AABB.

    Args:
        dance: Name of the dance, a key of `DANCES`.
        mode: "major" or "minor".
        rng: Random generator; equal generator states create equal tunes.
        density: Factor on the weight of a rhythm for each of its notes; above 1 = more notes.
    """
    if dance not in DANCES:
        raise ValueError(f"unknown dance {dance!r}; use one of {', '.join(sorted(DANCES))}")
    if mode not in SCALES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(sorted(SCALES))}")
    kind = DANCES[dance]
    metre = rng.choices([metre for metre, _ in kind.metres], weights=[weight for _, weight in kind.metres])[0]
    scale = Scale(_pick(rng, KEYS[mode]), _pick(rng, SCALES[mode]))
    composer = _Composer(scale, mode, _dense(metre, density), rng)
    parts = {letter: composer.part(composer.folk_phrases()) for letter in "AB"}
    bars = [bar for letter in rng.choice(kind.forms) for bar in parts[letter]]
    notes, chords = _score(bars, scale, metre, busy=rng.random() < BUSY_FRACTION)
    return Tune(dance, mode, scale, metre, len(bars), tuple(notes), tuple(chords))


@typed
def compose_song(style: Style, progression: Progression, rng: Random, density: float = 1.0) -> Tune:
    """Compose a song of two parts A and B over the chords of a progression, in an order such as AABA.

    Args:
        style: Style that provides the rhythms of the melody.
        progression: Scale and chords.
        rng: Random generator; equal generator states create equal songs.
        density: Factor on the weight of a rhythm for each of its notes; above 1 = more notes.
    """
    metre = rng.choice(style.metres)
    scale = Scale(rng.randrange(60, 72), NAMED_SCALES[progression.scale])
    composer = _Composer(scale, progression.mode, _dense(metre, density), rng)
    phrases = parse_phrases(progression.chords)
    if len(phrases) == 1:
        phrases = phrases * 2
    parts = {letter: composer.part(phrases) for letter in "AB"}
    bars = [bar for letter in rng.choice(_SONG_FORMS) for bar in parts[letter]]
    notes, chords = _score(bars, scale, metre, busy=False, chord_size=style.chord_size)
    return Tune(style.name, progression.mode, scale, metre, len(bars), tuple(notes), tuple(chords))
