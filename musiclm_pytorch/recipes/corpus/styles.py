"""Styles of the corpus as declarations, and the rhythms that they share.

A pattern of accompaniment or drums is a string with one character per step of a bar. All strings divide the bar evenly,
so that 16 characters are sixteenth notes of a bar in 4/4, and 12 characters are sixteenth notes of a bar in 3/4. The
character "." is a rest, and "-" continues the note before it.

- Chords: "x" is a chord, "X" a loud chord, and a number is one note of the chord, counted from the lowest.
- Bass: "r" is the root of the chord, "o" its octave, "t" the third, "f" the fifth, and "a" leads to the next root.
- Drums: "x" is a hit, "X" a loud hit and "o" a soft hit.
"""

from dataclasses import dataclass, field
from typing import Any

from musiclm_pytorch.recipes.corpus.dances import Metre

__all__ = [
    "FAST",
    "HYMN",
    "JAZZ_CHORDS",
    "LONG",
    "LYRICAL",
    "MEDIUM",
    "MINOR_CHORDS",
    "POP_CHORDS",
    "PULSING",
    "RIFF",
    "ROCK_FILLS",
    "SLOW",
    "SWINGING",
    "TENSE_CHORDS",
    "Beat",
    "Progression",
    "Style",
    "evenly",
]

Beat = dict[str, str]


@dataclass(frozen=True)
class Progression:
    """Scale of a song, and its chords for phrases of four bars in the notation of `theory.parse_phrases`."""

    scale: str
    chords: str

    @property
    def mode(self) -> str:
        """The label `mode`: "major" or "minor"."""
        return "major" if self.scale in ("ionian", "mixolydian") else "minor"


@dataclass(frozen=True)
class Style:
    """Declaration of a style of music. All dictionaries of weights have a value of a label as key.

    Args:
        name: Value of the label `style`.
        metres: Rhythms of the melody.
        tempi: Lowest and highest tempo in quarter notes per minute, by value of the label `tempo`.
        moods: Possible values of the label `mood`.
        progressions: Scales and chords.
        melody: Weights of melody instruments.
        chords: Weights of accompaniments; None = no chords.
        pads: Weights of second accompaniments.
        comping: Patterns of accompaniments that are not sustained.
        basses: Weights of bass instruments; None = no bass.
        bass_lines: Patterns of the bass.
        drums: Share of clips with drums.
        beats: Patterns of the drums.
        fills: Patterns of the drums in the last bar of a phrase.
        kits: Names of drum kits.
        recorded: Share of the clips with drums in which recorded drums replace the drums of the soundfont.
        effects: Weights of the label `effect`.
        restrike: Share of clips in which sustained accompaniments also play a pattern of `comping`.
        chord_size: Number of notes in a chord.
        swing: Position of the second eighth note in a beat: 0.5 is straight, 2/3 is triplet swing.
        held: Share of the written duration for which a melody note is held.
        swell: Whether loudness rises and falls in every phrase.
    """

    name: str
    metres: tuple[Metre, ...]
    tempi: dict[str, tuple[float, float]]
    moods: tuple[str, ...]
    progressions: tuple[Progression, ...]
    melody: dict[str, float]
    chords: dict[str | None, float]
    comping: tuple[str, ...]
    basses: dict[str | None, float] = field(default_factory=lambda: {None: 1.0})
    bass_lines: tuple[str, ...] = ()
    pads: dict[str | None, float] = field(default_factory=lambda: {None: 1.0})
    drums: float = 0.0
    beats: tuple[Beat, ...] = ()
    fills: tuple[Beat, ...] = ()
    kits: tuple[str, ...] = ("standard",)
    recorded: float = 0.0
    effects: dict[str | None, float] = field(default_factory=lambda: {None: 0.88, "reverb": 0.07, "low quality": 0.05})
    restrike: float = 0.0
    chord_size: int = 3
    swing: float = 0.5
    held: float = 0.97
    swell: bool = False


def evenly(names: str) -> dict[Any, float]:
    """Give equal weights to the names in a list with commas; a name listed twice has double weight, "none" is None."""
    listed = [None if name == "none" else name for name in names.split(", ")]
    return {name: float(listed.count(name)) for name in listed}


SLOW, MEDIUM, FAST = (58.0, 76.0), (94.0, 120.0), (146.0, 178.0)

# Rhythms of melodies in groups of two quarter notes, or of a bar.
LYRICAL = Metre(
    groups=(2.0, 2.0),
    figures={
        (1.0, 1.0): 3.0,
        (1.5, 0.5): 3.0,
        (2.0,): 1.5,
        (1.0, 0.5, 0.5): 2.0,
        (0.5, 0.5, 1.0): 2.0,
        (-0.5, 0.5, 1.0): 1.5,
        (-0.5, 0.5, 0.5, 0.5): 1.0,
    },
    closing=(((1.0, 1.0), (2.0,)), ((1.5, 0.5), (2.0,)), ((0.5, 0.5, 1.0), (1.5, -0.5))),
)
RIFF = Metre(
    groups=(2.0, 2.0),
    figures={
        (0.5, 0.5, 0.5, 0.5): 3.0,
        (0.75, 0.75, 0.5): 3.0,
        (0.5, 1.0, 0.5): 2.0,
        (1.0, 0.5, 0.5): 2.0,
        (-0.5, 0.5, 0.5, 0.5): 1.5,
        (0.25, 0.25, 0.5, 0.5, 0.5): 1.0,
        (1.5, 0.5): 1.0,
    },
    closing=(((0.5, 0.5, 0.5, 0.5), (2.0,)), ((0.75, 0.75, 0.5), (1.0, -1.0)), ((1.0, 0.5, 0.5), (2.0,))),
)
SWINGING = Metre(
    groups=(2.0, 2.0),
    figures={
        (0.5, 0.5, 0.5, 0.5): 4.0,
        (1.0, 0.5, 0.5): 3.0,
        (-0.5, 0.5, 0.5, 0.5): 2.0,
        (0.5, 0.5, 1.0): 2.0,
        (1.5, 0.5): 2.0,
        (-1.0, 0.5, 0.5): 1.0,
    },
    closing=(((0.5, 0.5, 0.5, 0.5), (2.0,)), ((1.0, 0.5, 0.5), (0.5, -1.5)), ((1.5, 0.5), (2.0,))),
)
PULSING = Metre(
    groups=(2.0, 2.0),
    figures={
        (0.25, 0.25, 0.5, 0.25, 0.25, 0.5): 3.0,
        (0.5, 0.25, 0.25, 0.5, 0.5): 3.0,
        (0.5, 0.5, 0.5, 0.5): 3.0,
        (0.75, 0.75, 0.5): 3.0,
        (0.25,) * 8: 1.0,
    },
    closing=(((0.5, 0.5, 0.5, 0.5), (0.75, 0.75, 0.5)), ((0.75, 0.75, 0.5), (1.0, -1.0))),
)
LONG = Metre(
    groups=(4.0,),
    figures={(4.0,): 1.5, (2.0, 2.0): 3.0, (3.0, 1.0): 3.0, (2.0, 1.0, 1.0): 3.0, (1.5, 0.5, 2.0): 2.0},
    closing=(((4.0,),), ((2.0, 2.0),)),
)
HYMN = Metre(
    groups=(2.0, 2.0),
    figures={(1.0, 1.0): 6.0, (1.0, 0.5, 0.5): 2.0, (2.0,): 1.0, (1.5, 0.5): 1.0},
    closing=(((1.0, 1.0), (2.0,)), ((2.0,), (2.0,))),
)

POP_CHORDS = tuple(
    Progression("ionian", chords)
    for chords in ("1|5|6|4", "1|6|4|5", "6|4|1|5", "1|4|6|5", "4|5|1|6 / 4|5|1|1", "1|3|4|5 / 1|6|4 5|1")
)
MINOR_CHORDS = tuple(
    Progression("aeolian", chords)
    for chords in ("1|6|3|7", "1|4|6|7", "1|7|6|7", "1|6|4|5+", "1|3|7|4 / 1|6|5+|1", "6|7|1|1")
)
TENSE_CHORDS = (
    Progression("harmonic", "1|1|6|5 / 1|4|5|1"),
    Progression("phrygian", "1|2|1|2"),
    Progression("harmonic", "1|2|5|1"),
    Progression("phrygian", "1|1|7|2 / 1|2|7|1"),
)
JAZZ_CHORDS = (
    Progression("ionian", "2|5|1|6 / 2|5|1|1"),
    Progression("ionian", "1 6|2 5|3 6|2 5 / 1 6|2 5|1|1"),
    Progression("ionian", "1|4|3 6|2 5 / 4|5|1|1"),
    Progression("aeolian", "1|4|7|3 / 6|2|5+|1"),
    Progression("aeolian", "1 6|2 5+|1|1 / 4|7|2 5+|1"),
    Progression("dorian", "1|1|4|4 / 1|2|5+|1"),
)
ROCK_FILLS: tuple[Beat, ...] = (
    {"kick": "x.......x.......", "snare": "....x.......xxxx", "hat": "x.x.x.x.x.x....."},
    {
        "kick": "x.......x.......",
        "snare": "....x...x.x.....",
        "high tom": "..........xx....",
        "low tom": "............xxxx",
    },
    {"kick": "x.......x.......", "snare": "....x.......x.xx", "hat": "x.x.x.x.x.x.....", "crash": "..............x."},
)
