"""Generation of captions from the labels of music clips."""

import re
import string
from collections.abc import Mapping
from random import Random
from typing import Any

from beartype import beartype

from musiclm_pytorch.recipes.corpus.wordings import HELD_OUT, TRAINING, Wordings

__all__ = ["FULL_FRACTION", "caption_variants"]

# Share of captions that mention most labels. The others mention the instrument and one or two labels.
FULL_FRACTION = 0.62

# The label that a slot needs. The slots for accompaniment and register may stay empty.
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
    """Whether a caption template fits the labels of a clip; the word "solo" needs a clip without accompaniment."""
    needed = [_LABEL_OF_SLOT[slot] for slot in _slots(template) if slot in _LABEL_OF_SLOT]
    if any(labels.get(label) is None for label in needed):
        return False
    return "solo" not in template or _is_solo(labels)


def _is_solo(labels: Mapping[str, Any]) -> bool:
    """Whether the labels describe a clip without accompaniment."""
    return "chords" in labels and labels["chords"] is None and labels.get("drums") is False


def _backing(labels: Mapping[str, Any], words: Wordings, rng: Random) -> str:
    """Draw words for the accompaniment, e.g. " with string chords and drums"; return "" if no label describes it."""
    players = []
    if labels.get("chords") is not None:
        players.append(rng.choice(words.chords[labels["chords"]]))
    if labels.get("drums"):
        players.append(rng.choice(words.drums))
    if players:
        # Avoid "accompanied by guitar accompaniment".
        joiners = _JOINERS if "accompaniment" not in players[0] else (" with ",)
        return rng.choice(joiners) + " and ".join(players)
    return rng.choice(words.solo) if _is_solo(labels) else ""


def _articles(sentence: str) -> str:
    """Replace every `a(n)` by "a" or "an", depending on the next letter."""
    return re.sub(r"\ba\(n\) (?=([a-z]))", lambda match: "an " if match[1] in "aeiou" else "a ", sentence)


def _fill(template: str, labels: Mapping[str, Any], words: Wordings, rng: Random) -> str:
    """Fill the slots of a caption template with random words for the labels."""
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
    """Check that the value of every label is a known value."""
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
            raise ValueError(f"got the unknown {label} {value!r}; use one of {', '.join(sorted(known))}")


@beartype
def caption_variants(labels: Mapping[str, Any], rng: Random, count: int, held_out: bool = False) -> list[str]:
    """Generate different captions of one clip, in lower case and without a full stop.

    Args:
        labels: Values of any of the labels `instrument, tempo, dance, mode, chords, drums, register`; captions do not
            mention missing labels, and `chords: None` means a clip without chords.
        rng: Random generator.
        count: Number of captions, or fewer captions if few templates fit the labels.
        held_out: Whether to use words of held-out captions instead of words of training captions.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    _check(labels)
    words = HELD_OUT if held_out else TRAINING
    full = [template for template in words.full if _suits(template, labels)]
    partial = [template for template in words.partial if _suits(template, labels)]
    if not full and not partial:
        raise ValueError(
            f"no caption template exists for the labels {sorted(labels)}; pass an instrument, or a tempo, a "
            "mode and a dance"
        )
    captions: list[str] = []
    # Twenty attempts per caption, since few templates fit sparse labels.
    for _ in range(20 * count):
        templates = full if full and (not partial or rng.random() < FULL_FRACTION) else partial
        caption = _fill(rng.choice(templates), labels, words, rng)
        if caption not in captions:
            captions.append(caption)
        if len(captions) == count:
            break
    return captions
