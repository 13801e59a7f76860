"""Rhythms of the dances of the toy corpus. A rhythm divides each bar into groups of notes.

All durations in the tables of rhythms are in quarter notes. For example, a bar of a jig (6/8) lasts 3 quarter notes, in
two groups of three eighth notes.
"""

from dataclasses import dataclass

__all__ = ["DANCES", "HORNPIPE", "JIG", "MARCH", "SONG", "WALTZ", "Dance", "Metre"]

Figure = tuple[float, ...]


@dataclass(frozen=True)
class Metre:
    """Rhythms that the bars of a tune can have, with positions of drum hits.

    Args:
        groups: Length in quarter notes of each group of notes in a bar; a group starts on a strong beat.
        figures: Possible rhythms of one group of notes, with the weight of each rhythm; negative durations are rests.
        closing: Possible rhythms of the last bar of a phrase, with one rhythm per group of notes.
        kick: Positions of bass drum hits in the bar, in quarter notes.
        snare: Positions of snare drum hits in the bar, in quarter notes.
    """

    groups: tuple[float, ...]
    figures: dict[Figure, float]
    closing: tuple[tuple[Figure, ...], ...]
    kick: tuple[float, ...] = ()
    snare: tuple[float, ...] = ()

    @property
    def quarters_per_bar(self) -> float:
        """Length of a bar in quarter notes."""
        return sum(self.groups)


@dataclass(frozen=True)
class Dance:
    """A dance with its possible rhythms (with weights) and possible orders of two eight-bar parts, such as AABB."""

    metres: tuple[tuple[Metre, float], ...]
    forms: tuple[str, ...]


_THIRD = 1 / 3

REEL = Metre(
    groups=(2.0, 2.0),
    figures={
        (0.5, 0.5, 0.5, 0.5): 8.0,
        (1.0, 0.5, 0.5): 4.0,
        (0.5, 0.5, 1.0): 2.0,
        (1.0, 1.0): 1.0,
        (0.5, 0.25, 0.25, 0.5, 0.5): 0.7,
        (1.5, 0.5): 0.7,
    },
    closing=(
        ((0.5, 0.5, 0.5, 0.5), (1.0, 1.0)),
        ((1.0, 1.0), (2.0,)),
        ((0.5, 0.5, 0.5, 0.5), (2.0,)),
        ((1.0, 0.5, 0.5), (1.0, 1.0)),
    ),
    kick=(0.0, 2.0),
    snare=(1.0, 3.0),
)
HORNPIPE = Metre(
    groups=(2.0, 2.0),
    figures={
        (0.75, 0.25, 0.75, 0.25): 8.0,
        (1.0, 0.75, 0.25): 3.0,
        (0.75, 0.25, 1.0): 2.0,
        (_THIRD, _THIRD, _THIRD, 0.75, 0.25): 2.0,
        (1.0, 1.0): 1.0,
    },
    closing=(((0.75, 0.25, 0.75, 0.25), (1.0, 1.0)), ((1.0, 1.0), (2.0,)), ((1.0, 1.0), (1.0, 0.75, 0.25))),
    kick=(0.0, 2.0),
    snare=(1.0, 3.0),
)
JIG = Metre(
    groups=(1.5, 1.5),
    figures={(0.5, 0.5, 0.5): 8.0, (1.0, 0.5): 4.0, (1.5,): 0.6, (0.75, 0.25, 0.5): 0.8, (0.5, 1.0): 0.3},
    closing=(((0.5, 0.5, 0.5), (1.5,)), ((1.0, 0.5), (1.5,)), ((1.0, 0.5), (1.0, 0.5)), ((0.5, 0.5, 0.5), (1.0, 0.5))),
    kick=(0.0,),
    snare=(1.5,),
)
SLIP_JIG = Metre(
    groups=(1.5, 1.5, 1.5),
    figures={(0.5, 0.5, 0.5): 7.0, (1.0, 0.5): 5.0, (1.5,): 0.8},
    closing=(
        ((0.5, 0.5, 0.5), (1.0, 0.5), (1.5,)),
        ((1.0, 0.5), (1.0, 0.5), (1.5,)),
        ((1.0, 0.5), (0.5, 0.5, 0.5), (1.5,)),
    ),
    kick=(0.0,),
    snare=(1.5, 3.0),
)
WALTZ = Metre(
    groups=(3.0,),
    figures={
        (1.0, 1.0, 1.0): 5.0,
        (2.0, 1.0): 4.0,
        (1.0, 0.5, 0.5, 1.0): 2.5,
        (1.5, 0.5, 1.0): 2.0,
        (1.0, 1.0, 0.5, 0.5): 2.0,
        (0.5, 0.5, 0.5, 0.5, 0.5, 0.5): 1.5,
    },
    closing=(((3.0,),), ((2.0, 1.0),)),
    kick=(0.0,),
    snare=(1.0, 2.0),
)
SONG = Metre(
    groups=(2.0, 2.0),
    figures={
        (1.0, 1.0): 5.0,
        (1.0, 0.5, 0.5): 4.0,
        (1.5, 0.5): 3.0,
        (0.5, 0.5, 1.0): 2.0,
        (0.5, 0.5, 0.5, 0.5): 2.5,
        (2.0,): 0.8,
    },
    closing=(((1.0, 1.0), (2.0,)), ((1.5, 0.5), (2.0,)), ((1.0, 0.5, 0.5), (2.0,))),
    kick=(0.0, 2.0),
    snare=(1.0, 3.0),
)
MARCH = Metre(
    groups=(2.0, 2.0),
    figures={
        (1.0, 1.0): 4.0,
        (1.0, 0.5, 0.5): 5.0,
        (0.75, 0.25, 1.0): 3.0,
        (1.5, 0.5): 1.5,
        (0.5, 0.5, 0.5, 0.5): 4.0,
        (0.5, 0.5, 1.0): 2.0,
    },
    closing=(((1.0, 1.0), (2.0,)), ((0.5, 0.5, 0.5, 0.5), (1.0, 1.0)), ((1.0, 1.0), (1.0, 1.0))),
    kick=(0.0, 2.0),
    snare=(1.0, 3.0),
)

_DANCE_FORMS = ("AABB",)
_SONG_FORMS = ("AABA", "ABAB", "AABB")

# Every value of the label `dance`.
DANCES: dict[str, Dance] = {
    "reel": Dance(((REEL, 1.0),), _DANCE_FORMS),
    "jig": Dance(((JIG, 1.0),), _DANCE_FORMS),
    "hornpipe": Dance(((HORNPIPE, 1.0),), _DANCE_FORMS),
    "waltz": Dance(((WALTZ, 1.0),), ("AABB", "AABA")),
    "slip jig": Dance(((SLIP_JIG, 1.0),), _DANCE_FORMS),
    "folk tune": Dance(((SONG, 3.0), (WALTZ, 1.0), (JIG, 1.0)), _SONG_FORMS),
    "morris dance": Dance(((MARCH, 2.0), (JIG, 1.0)), _DANCE_FORMS),
    "country dance": Dance(((MARCH, 2.0), (REEL, 1.0), (JIG, 1.0)), _DANCE_FORMS),
    "christmas carol": Dance(((SONG, 3.0), (WALTZ, 1.0)), _SONG_FORMS),
}
