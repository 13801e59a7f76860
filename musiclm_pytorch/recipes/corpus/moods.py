"""Moods of the corpus as constraints on the composition and the performance."""

from dataclasses import dataclass

__all__ = ["MOODS", "Mood"]


@dataclass(frozen=True)
class Mood:
    """Attributes that express a mood.

    Args:
        modes: Possible modes.
        tempi: Possible values of the label `tempo`.
        registers: Possible registers of the melody.
        density: Factor on the weight of a melody rhythm for each of its notes.
        held: Factor on the held share of melody notes; below 1 = staccato.
        velocity: Difference of the MIDI velocity of melody and chords.
        scales: Scales that are preferred, if the style has progressions in one of them.
    """

    modes: tuple[str, ...] = ("major", "minor")
    tempi: tuple[str, ...] = ("slow", "medium tempo", "fast")
    registers: tuple[str, ...] = ("low", "mid", "high")
    density: float = 1.0
    held: float = 1.0
    velocity: int = 0
    scales: tuple[str, ...] = ()


MOODS: dict[str, Mood] = {
    "happy": Mood(("major",), ("medium tempo", "fast"), ("mid", "high"), density=1.2, held=0.9, velocity=4),
    "sad": Mood(("minor",), ("slow",), density=0.75, held=1.1, velocity=-12),
    "calm": Mood(tempi=("slow",), density=0.65, held=1.1, velocity=-16),
    "energetic": Mood(tempi=("fast",), density=1.3, held=0.85, velocity=14),
    "dark": Mood(("minor",), ("slow", "medium tempo"), ("low",)),
    "dreamy": Mood(("major",), ("slow", "medium tempo"), ("mid", "high"), density=0.75, held=1.1, velocity=-12),
    "tense": Mood(("minor",), ("medium tempo", "fast"), density=1.3, held=0.5, scales=("harmonic", "phrygian")),
    "romantic": Mood(("major",), ("slow",), ("mid", "high"), held=1.1, velocity=-8),
    "epic": Mood(tempi=("medium tempo", "fast"), held=1.0, velocity=16),
    "playful": Mood(("major",), ("medium tempo", "fast"), ("mid", "high"), held=0.45),
    "mysterious": Mood(
        ("minor",), ("slow", "medium tempo"), density=0.6, velocity=-12, scales=("harmonic", "phrygian")
    ),
    "groovy": Mood(tempi=("medium tempo",), held=0.85),
}
