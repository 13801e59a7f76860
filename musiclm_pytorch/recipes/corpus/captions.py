"""Generation of captions from the labels of music clips."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.recipes.corpus import vocabulary
from musiclm_pytorch.recipes.corpus.sentences import CLAUSES, HELD_OUT_SENTENCES, OPENINGS, SHORT
from musiclm_pytorch.recipes.corpus.wordings import HELD_OUT, TRAINING, Wordings

__all__ = ["FULL_FRACTION", "caption_variants", "hard_negatives"]

# Share of classic captions that mention most labels. The others mention the instrument and one or two labels.
FULL_FRACTION = 0.62
# Shares of the kinds of captions of folk dances and of styles. Classic captions have the templates of `wordings`.
_FOLK_KINDS = {"classic": 0.62, "short": 0.13, "sentences": 0.15, "keywords": 0.10}
_STYLE_KINDS = {"classic": 0.30, "short": 0.22, "sentences": 0.30, "keywords": 0.18}
_HELD_OUT_KINDS = {"classic": 0.6, "held-out sentences": 0.4}

# Weights of the attributes that hard negatives change. MuLaN learns the tempo last.
_CHANGES = {"tempo": 6.0, "instrument": 2.0, "mood": 1.0, "drums": 1.0, "register": 1.0}

# Possible keywords.
_REMARKS = ("instrumental", "no vocals", "no drums", "solo")
_JOINERS = (" with ", " with ", " with ", " accompanied by ", " over ", " backed by ")

_Labels = Mapping[str, Any]
# Words for the values of the labels of a clip, by slot.
_Words = dict[str, tuple[str, ...]]


def _slots(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _is_solo(labels: _Labels) -> bool:
    """Whether the labels describe a clip without accompaniment."""
    silent = all(labels.get(name) is None for name in ("chords", "pad", "bass"))
    return "chords" in labels and silent and labels.get("drums") is False


def _has_no_voices(labels: _Labels) -> bool:
    return labels.get("instrument") != "choir" and "choir chords" not in (labels.get("chords"), labels.get("pad"))


# Conditions of words in the text of a template, apart from its slots. The first expression that fits a word counts.
_CONDITIONS: tuple[tuple[str, Callable[[_Labels], bool]], ...] = (
    (r"solo|no other instruments", _is_solo),
    (r"folk", lambda labels: labels.get("style", "folk dance") == "folk dance"),
    (r"instrumental|vocals|voices?|singing", _has_no_voices),
    (r"no (drums|percussion)", lambda labels: labels.get("drums") is False),
    (r"(?<!no )(drums|percussion|rhythm section|beat)", lambda labels: labels.get("drums") is True),
    (r"bass", lambda labels: labels.get("bass") is not None),
    (r"low register", lambda labels: labels.get("register") == "low"),
    (r"high pitched", lambda labels: labels.get("register") == "high"),
)


def _suits(template: str, labels: _Labels, words: _Words) -> bool:
    """Whether a caption template fits the labels of a clip: words exist for its slots, and its text is true."""
    if any(slot not in words for slot in _slots(template)):
        return False
    text = re.sub(r"{\w+}", "", template)
    return all(condition(labels) for word, condition in _CONDITIONS if re.search(rf"\b({word})\b", text))


def _words_of(labels: _Labels, wordings: Wordings) -> _Words:
    """Collect words for every slot that the labels can fill."""
    known = {
        "instrument": wordings.instrument,
        "tempo": wordings.tempo,
        "dance": wordings.dance,
        "mode": wordings.mode,
        "chords": wordings.chords,
        "register": wordings.register,
        "style": vocabulary.GENRES,
        "mood": vocabulary.MOODS,
        "bass": vocabulary.BASS_PLAYERS,
        "effect": vocabulary.EFFECTS,
    }
    for label, values in known.items():
        value = labels.get(label)
        if value is not None and value not in values:
            raise ValueError(f"got the unknown {label} {value!r}; use one of {', '.join(sorted(values))}")
    style, tempo, mode, bass = (labels.get(name) for name in ("style", "tempo", "mode", "bass"))
    words: _Words = {name: values[labels[name]] for name, values in known.items() if labels.get(name) is not None}
    words["genre"] = words.pop("style", ())
    words["use"] = vocabulary.USES[style] if style else ()
    if style in vocabulary.SONGS:
        words["song"] = vocabulary.SONGS[style]
        words.setdefault("dance", vocabulary.SONGS[style])
    if tempo is not None:
        words["pace"], words["tempo_word"] = wordings.pace[tempo], vocabulary.TEMPO_WORDS[tempo]
    if mode is not None:
        words["key"], words["mode_word"] = wordings.key[mode], (mode,)
    if labels.get("chords") is not None:
        words["player"] = vocabulary.CHORD_PLAYERS[labels["chords"]]
    if bass is not None:
        words["bass_line"] = vocabulary.BASS_LINES.get(style or "", ("bass line", "simple bass line"))
    if labels.get("drums"):
        words["drums"] = wordings.drums + vocabulary.DRUM_BEATS.get(style or "", ())
    if style not in (None, "folk dance") and "instrument" in words:
        words["instrument"] = tuple(name for name in words["instrument"] if "folk" not in name)
    words["register"] = words.get("register", ("",))
    words["backing"] = ("",)
    return {name: values for name, values in words.items() if values}


def _list(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]


def _backing(labels: _Labels, words: _Words, wordings: Wordings, rng: Random) -> str:
    """Draw words for the accompaniment, e.g. " with string chords and drums"; return "" if no label describes it."""
    players = [rng.choice(words[slot]) for slot in ("chords", "bass", "drums") if slot in words]
    if labels.get("pad") is not None:
        players.insert(1, rng.choice(wordings.chords[labels["pad"]]))
    if labels.get("style", "folk dance") != "folk dance" and len(players) > 1 and rng.random() < 0.4:
        # Captions of people often name only a part of the accompaniment.
        players = players[: rng.randint(1, len(players) - 1)] if rng.random() < 0.5 else players[1:]
    if players:
        # Avoid "accompanied by guitar accompaniment".
        joiners = _JOINERS if "accompaniment" not in players[0] else (" with ",)
        return rng.choice(joiners) + _list(players)
    return rng.choice(wordings.solo) if _is_solo(labels) else ""


def _articles(sentence: str) -> str:
    """Replace every `a(n)` by "a" or "an", depending on the next letter."""
    return re.sub(r"\ba\(n\) (?=([a-z]))", lambda match: "an " if match[1] in "aeiou" else "a ", sentence)


class _Writer:
    """Writer of random captions of one clip."""

    def __init__(self, labels: _Labels, wordings: Wordings, rng: Random) -> None:
        self.labels, self.wordings, self.rng = labels, wordings, rng
        self.words = _words_of(labels, wordings)

    def suitable(self, templates: Sequence[str]) -> list[str]:
        return [template for template in templates if _suits(template, self.labels, self.words)]

    def fill(self, template: str) -> str:
        """Fill the slots of a template with random words for the labels; a slot never repeats a word."""
        parts, used = [], set()
        for text, slot, _, _ in string.Formatter().parse(template):
            parts.append(text)
            if slot == "backing":
                parts.append(_backing(self.labels, self.words, self.wordings, self.rng))
            elif slot:
                unused = [word for word in self.words[slot] if word not in used or not word]
                parts.append(self.rng.choice(unused or self.words[slot]))
                used.add(parts[-1])
        return "".join(parts)

    def sentences(self) -> str:
        """Write an opening and sentences about one to four further attributes."""
        opening = self.rng.choice(self.suitable(OPENINGS))
        topics = {topic: self.suitable(templates) for topic, templates in CLAUSES.items()}
        topics = {topic: templates for topic, templates in topics.items() if templates}
        if "{instrument}" in opening:
            topics.pop("melody", None)
        drawn = set(self.rng.sample(list(topics), min(self.rng.randint(1, 4), len(topics))))
        if "melody" in topics and self.rng.random() < 0.7:
            drawn.add("melody")
        if "effect" in topics and self.rng.random() < 0.5:
            drawn.add("effect")
        texts = [opening] + [self.rng.choice(templates) for topic, templates in topics.items() if topic in drawn]
        return ". ".join(self.fill(text) for text in texts)

    def keywords(self) -> str:
        """Write a list of words for two to seven attributes, in random order."""
        slots = ("genre", "mood", "chords", self.rng.choice(("bass", "bass_line")), "drums", "key", "effect")
        items = [self.rng.choice(self.words[slot]) for slot in slots if slot in self.words]
        if "tempo_word" in self.words:
            items.append(self.rng.choice(self.words["tempo_word"]) + " tempo")
        if remarks := self.suitable(_REMARKS):
            items.append(self.rng.choice(remarks))
        items = self.rng.sample(items, min(self.rng.randint(1, 6), len(items)))
        if "instrument" in self.words and self.rng.random() < 0.9:
            items.insert(self.rng.randint(0, min(2, len(items))), self.rng.choice(self.words["instrument"]))
        return ", ".join(items)

    def caption(self, kind: str) -> str | None:
        """Write a caption of a kind, or return None if no template suits the labels."""
        if kind == "sentences":
            text = self.sentences() if self.suitable(OPENINGS) else None
        elif kind == "keywords":
            text = self.keywords()
        elif kind == "classic":
            full, partial = self.suitable(self.wordings.full), self.suitable(self.wordings.partial)
            templates = full if full and (not partial or self.rng.random() < FULL_FRACTION) else partial
            text = self.fill(self.rng.choice(templates)) if templates else None
        else:
            templates = self.suitable(SHORT if kind == "short" else HELD_OUT_SENTENCES)
            text = self.fill(self.rng.choice(templates)) if templates else None
        return _articles(text) if text else None


@typed
def caption_variants(labels: Mapping[str, Any], rng: Random, count: int, held_out: bool = False) -> list[str]:
    """Generate different captions of one clip, in lower case and without a full stop at the end.

    Args:
        labels: Values of any of the labels of a clip, as in a manifest of the corpus; captions do not mention missing
            labels, and `chords: None` means a clip without chords. Without the label `style`, all captions have the
            templates of folk dances.
        rng: Random generator.
        count: Number of captions, or fewer captions if few templates fit the labels.
        held_out: Whether to use words of held-out captions instead of words of training captions.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    writer = _Writer(labels, HELD_OUT if held_out else TRAINING, rng)
    style = labels.get("style")
    if style is None:
        kinds = {"classic": 1.0}
    elif held_out:
        kinds = _HELD_OUT_KINDS
    else:
        kinds = _FOLK_KINDS if style == "folk dance" else _STYLE_KINDS
    captions: list[str] = []
    # Twenty attempts per caption, since few templates fit sparse labels.
    for _ in range(20 * count):
        caption = writer.caption(rng.choices(list(kinds), weights=list(kinds.values()))[0])
        if caption is not None and caption not in captions:
            captions.append(caption)
        if len(captions) == count:
            break
    if not captions:
        raise ValueError(
            f"no caption template exists for the labels {sorted(labels)}; pass an instrument, or a tempo, a "
            "mode and a dance"
        )
    return captions


@typed
def hard_negatives(labels: Mapping[str, Any], rng: Random, count: int) -> list[str]:
    """Generate captions that are false for a clip, because they mention another value of one attribute.

    The arguments are those of `caption_variants`. The attribute is most often the tempo.
    """
    values = {
        "tempo": TRAINING.tempo,
        "instrument": TRAINING.instrument,
        "mood": vocabulary.MOODS,
        "drums": (True,),
        "register": TRAINING.register,
    }
    true_words = {word for words in _words_of(labels, TRAINING).values() for word in words}
    captions: list[str] = []
    for _ in range(20 * count):
        name = rng.choices(list(_CHANGES), weights=list(_CHANGES.values()))[0]
        others = [value for value in values[name] if value != labels.get(name)]
        if labels.get(name) is None or not others:
            continue
        changed = {**labels, name: rng.choice(others)}
        false_words = {word for words in _words_of(changed, TRAINING).values() for word in words} - true_words
        caption = caption_variants(changed, rng, 1)[0]
        if caption not in captions and any(re.search(rf"\b{re.escape(word)}\b", caption) for word in false_words):
            captions.append(caption)
        if len(captions) == count:
            break
    return captions
