"""Puts the labels of a clip into sentences."""

import re
import string
from collections.abc import Mapping
from random import Random
from typing import Any

from beartype import beartype

from musiclm_pytorch.recipes.corpus.wordings import HELD_OUT, TRAINING, Wordings

__all__ = ["FULL_FRACTION", "caption_variants"]

# The share of captions that mention most of what is labelled; the others mention an instrument and a thing or two.
FULL_FRACTION = 0.62

# The label that has to be there for a slot to be filled; accompaniment and register are left out when not labelled.
_LABEL_OF_SLOT = {
    "instrument": "instrument",
    "tempo": "tempo",
    "pace": "tempo",
    "dance": "dance",
    "mode": "mode",
    "key": "mode",
}

_JOINERS = (" with ", " with ", " with ", " accompanied by ", " over ", " backed by ")


def _slots(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _suits(template: str, labels: Mapping[str, Any]) -> bool:
    """Whether every slot has its label, and a template that says solo is given a solo."""
    needed = [_LABEL_OF_SLOT[slot] for slot in _slots(template) if slot in _LABEL_OF_SLOT]
    if any(labels.get(label) is None for label in needed):
        return False
    return "solo" not in template or _is_solo(labels)


def _is_solo(labels: Mapping[str, Any]) -> bool:
    """Whether it is known that nobody accompanies."""
    return "chords" in labels and labels["chords"] is None and labels.get("drums") is False


def _backing(labels: Mapping[str, Any], words: Wordings, rng: Random) -> str:
    """Who accompanies: " with string chords and drums", " solo", or nothing when it is not labelled."""
    players = []
    if labels.get("chords") is not None:
        players.append(rng.choice(words.chords[labels["chords"]]))
    if labels.get("drums"):
        players.append(rng.choice(words.drums))
    if players:
        # Not "accompanied by guitar accompaniment".
        joiners = _JOINERS if "accompaniment" not in players[0] else (" with ",)
        return rng.choice(joiners) + " and ".join(players)
    return rng.choice(words.solo) if _is_solo(labels) else ""


def _articles(sentence: str) -> str:
    """Every `a(n)` as "a" or "an", by the letter that follows."""
    return re.sub(r"\ba\(n\) (?=([a-z]))", lambda match: "an " if match[1] in "aeiou" else "a ", sentence)


def _fill(template: str, labels: Mapping[str, Any], words: Wordings, rng: Random) -> str:
    """A template with all its slots filled."""
    values = {}
    for slot in _slots(template):
        if slot == "backing":
            values[slot] = _backing(labels, words, rng)
        elif slot == "register":
            values[slot] = rng.choice(words.register[labels["register"]]) if labels.get("register") is not None else ""
        else:
            values[slot] = rng.choice(getattr(words, slot)[labels[_LABEL_OF_SLOT[slot]]])
    return _articles(template.format(**values))


def _check(labels: Mapping[str, Any]) -> None:
    """Refuse values there is no word for, by name."""
    known_values = {
        "instrument": TRAINING.instrument,
        "tempo": TRAINING.tempo,
        "dance": TRAINING.dance,
        "mode": TRAINING.mode,
        "chords": TRAINING.chords,
        "register": TRAINING.register,
    }
    for label, known in known_values.items():
        value = labels.get(label)
        if value is not None and value not in known:
            raise ValueError(f"no wording for {label} {value!r}; known are {', '.join(sorted(known))}.")


@beartype
def caption_variants(labels: Mapping[str, Any], rng: Random, count: int, held_out: bool = False) -> list[str]:
    """Different captions of one clip.

    Args:
        labels: Any of `instrument, tempo, dance, mode, chords, drums, register` with the values of a manifest; what is
            absent (or None; for `chords`, None says that there are none) is not mentioned.
        rng: Source of the choices.
        count: How many captions, >= 1.
        held_out: Use the wordings that no training caption uses.

    Returns:
        `count` captions that differ from one another, in lower case without a full stop. Fewer when the labels give too
        little to say.

    Raises:
        ValueError: If a value has no wording, `count` is below 1, or the labels fit no template.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    _check(labels)
    words = HELD_OUT if held_out else TRAINING
    full = [template for template in words.full if _suits(template, labels)]
    partial = [template for template in words.partial if _suits(template, labels)]
    if not full and not partial:
        raise ValueError(
            f"no caption can be made of the labels {sorted(labels)}; give an instrument, or a tempo, mode and dance."
        )
    captions: list[str] = []
    # Twenty tries a caption: the few templates of sparse labels repeat themselves.
    for _ in range(20 * count):
        templates = full if full and (not partial or rng.random() < FULL_FRACTION) else partial
        caption = _fill(rng.choice(templates), labels, words, rng)
        if caption not in captions:
            captions.append(caption)
        if len(captions) == count:
            break
    return captions
