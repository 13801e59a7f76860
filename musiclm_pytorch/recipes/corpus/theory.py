"""Scales, chords and chord progressions of the toy corpus.

Melodies are sequences of scale degrees (0 is the tonic, 7 is the tonic an octave higher, -1 is the note below the
tonic). A motif of scale degrees stays in the key when it is transposed.
"""

from dataclasses import dataclass

__all__ = ["CADENCES", "KEYS", "NAMED_SCALES", "OPENINGS", "SCALES", "Chord", "Scale", "parse_phrases"]

# Scales of the progressions of styles, as semitones above the tonic.
NAMED_SCALES: dict[str, tuple[int, ...]] = {
    "ionian": (0, 2, 4, 5, 7, 9, 11),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "aeolian": (0, 2, 3, 5, 7, 8, 10),
    "harmonic": (0, 2, 3, 5, 7, 8, 11),
    "phrygian": (0, 1, 3, 5, 7, 8, 10),
}

# Scales of each value of the label `mode`, as semitones above the tonic, with weights.
SCALES: dict[str, dict[tuple[int, ...], float]] = {
    "major": {(0, 2, 4, 5, 7, 9, 11): 6.0, (0, 2, 4, 5, 7, 9, 10): 1.0},  # ionian, mixolydian
    "minor": {(0, 2, 3, 5, 7, 8, 10): 3.0, (0, 2, 3, 5, 7, 9, 10): 2.0},  # aeolian, dorian
}

# MIDI pitches of the tonic with weights: keys that are common for fiddle, flute and accordion.
KEYS: dict[str, dict[int, float]] = {
    "major": {62: 4.0, 67: 4.0, 69: 2.0, 60: 2.0, 65: 1.0, 70: 0.5, 64: 0.5},  # D G A C F B-flat E
    "minor": {64: 4.0, 69: 3.0, 62: 2.0, 71: 1.5, 67: 1.0},  # e a d b g
}


@dataclass(frozen=True)
class Chord:
    """A chord whose root is a degree of a scale.

    Args:
        degree: Scale degree of the root, 0..6.
        leading: Whether the seventh degree of the scale is raised (the major dominant of a minor key).
        dominant: Whether the chord is a dominant seventh chord, also if the scale lacks its notes (blues).
    """

    degree: int
    leading: bool = False
    dominant: bool = False

    def has(self, degree: int) -> bool:
        """Whether the scale degree `degree`, in any octave, belongs to the chord."""
        return (degree - self.degree) % 7 in (0, 2, 4)


@dataclass(frozen=True)
class Scale:
    """A musical scale of seven notes per octave.

    Args:
        tonic: MIDI pitch of degree 0.
        steps: Semitones from the tonic to each of the seven degrees, in ascending order from 0.
    """

    tonic: int
    steps: tuple[int, ...]

    def pitch(self, degree: int, leading: bool = False) -> int:
        """Return the MIDI pitch of a scale degree; `leading` raises a minor seventh degree by a semitone."""
        octave, step = divmod(degree, 7)
        raised = int(leading and step == 6 and self.steps[6] == 10)
        return self.tonic + 12 * octave + self.steps[step] + raised

    def chord(self, chord: Chord, lowest: int, size: int = 3) -> tuple[int, ...]:
        """Return the MIDI pitches of a chord of `size` notes in root position (root in the octave above `lowest`)."""
        root = self.pitch(chord.degree, chord.leading)
        if chord.dominant:
            pitches = [root + interval for interval in (0, 4, 7, 10)]
        else:
            pitches = [self.pitch(chord.degree + 2 * third, chord.leading) for third in range(size)]
        shift = lowest + (root - lowest) % 12 - root
        return tuple(pitch + shift for pitch in pitches)


def _bars(*bars: str) -> tuple[tuple[Chord, ...], ...]:
    """Parse one string of chords per bar, such as "1 5" for chords on degrees 1 and 5.

    A "+" raises the seventh degree of the scale, and "d" makes a dominant seventh chord.
    """
    return tuple(tuple(Chord(int(name[0]) - 1, "+" in name, "d" in name) for name in bar.split()) for bar in bars)


def parse_phrases(progression: str) -> list[tuple[tuple[Chord, ...], ...]]:
    """Parse the chords of a progression, such as "1|4|1|5 / 1|4|5|1" for two phrases of four bars."""
    return [_bars(*phrase.split("|")) for phrase in progression.split("/")]


# First two bars of a phrase, by mode.
OPENINGS = {
    "major": [
        _bars(*pair)
        for pair in (
            ("1", "1"),
            ("1", "4"),
            ("1", "5"),
            ("1", "6"),
            ("1", "2"),
            ("1 4", "1"),
            ("1 5", "1"),
            ("1", "4 5"),
            ("4", "1"),
        )
    ],
    "minor": [
        _bars(*pair)
        for pair in (("1", "1"), ("1", "7"), ("1", "4"), ("1", "3"), ("1 7", "1"), ("1", "1 7"), ("1", "5"))
    ],
}

# Last two bars of a phrase, with an open cadence, or with a closed cadence on the tonic.
CADENCES = {
    ("major", "open"): [_bars(*pair) for pair in (("1", "5"), ("4", "5"), ("2", "5"), ("1 4", "5"), ("6", "5"))],
    ("major", "closed"): [
        _bars(*pair) for pair in (("5", "1"), ("4 5", "1"), ("1 5", "1"), ("2 5", "1"), ("1", "5 1"))
    ],
    ("minor", "open"): [_bars(*pair) for pair in (("1", "7"), ("4", "5+"), ("3", "7"), ("1 4", "5+"))],
    ("minor", "closed"): [
        _bars(*pair) for pair in (("7", "1"), ("5+", "1"), ("4 5+", "1"), ("3 7", "1"), ("1", "7 1"))
    ],
}
