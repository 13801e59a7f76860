"""Texts that describe a clip: its captions and aspects, and the selection of texts for an epoch."""

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import is_encodable, texts_in
from audiolm_pytorch.data.manifest import AudioItem, captions_of
from audiolm_pytorch.nn.module_state import check_shares

__all__ = ["CaptionSampler", "aspects_of", "hard_negatives_of", "parse_aspects", "texts_of"]

_ASPECT_LABELS = ("aspects", "aspect_list")
_MAX_ASPECT_CHARACTERS = 2**16
# A string literal of Python or JSON. Lists are matched first, since deep nesting can crash Python's parser.
_LITERAL = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
_LIST_OF_LITERALS = re.compile(rf"\[\s*(?:{_LITERAL}\s*(?:,\s*{_LITERAL}\s*)*,?\s*)?\]")
# White space after a comma or the end of a sentence, so that 1,000 and 4.5 are not split.
_BETWEEN_PARTS = re.compile(r"(?<=[,;.!?])\s+")
_SENTENCE_ENDS, _PART_ENDS = ".!?", ",;"
# The crops of a clip are drawn from [seed, epoch, index]; texts need other random numbers.
_TEXT_STREAM = 0x776F7264


@typed
def aspects_of(item: AudioItem) -> list[str]:
    """List the different aspects of an item (e.g. "slow tempo", "piano") in its labels `aspects` and `aspect_list`.

    The value of `aspects` and of `aspect_list` is a list of texts, or one text that `parse_aspects` splits.
    """
    aspects: list[str] = []
    for name in _ASPECT_LABELS:
        value = item.labels.get(name)
        try:
            aspects += parse_aspects(value) if isinstance(value, str) else texts_in(value)
        except ValueError as error:
            raise ValueError(f"{item.path}: label {name!r}: {error}") from error
    return list(dict.fromkeys(aspects))


@typed
def texts_of(item: AudioItem) -> list[str]:
    """Return the captions of an item; without captions, return one text with all aspects, or an empty list."""
    return captions_of(item) or texts_in(", ".join(aspects_of(item)))


@typed
def hard_negatives_of(item: AudioItem) -> list[str]:
    """Return the texts in the label `hard_negatives`: captions that differ from a true caption in one attribute."""
    try:
        return texts_in(item.labels.get("hard_negatives"))
    except ValueError as error:
        raise ValueError(f"{item.path}: label 'hard_negatives': {error}") from error


@typed
def parse_aspects(text: str) -> list[str]:
    """Parse a list in JSON or Python syntax (`['slow tempo', "children's song"]`), or texts separated by commas.

    Python code in the text is never executed. Blank aspects are left out. A text that starts with "[" and is not a list
    of texts raises a ValueError.
    """
    text = text.strip()
    if len(text) > _MAX_ASPECT_CHARACTERS:
        raise ValueError(f"the aspects have {len(text)} characters, the limit is {_MAX_ASPECT_CHARACTERS} in total")
    aspects = _list_entries(text) if text.startswith("[") else text.split(",")
    if not all(isinstance(aspect, str) and is_encodable(aspect) for aspect in aspects):
        raise ValueError(f"need a list of texts, e.g. ['slow tempo', 'piano'], got {ascii(text)[:100]}")
    return [aspect.strip() for aspect in aspects if aspect.strip()]


def _list_entries(text: str) -> list[Any]:
    """Parse a list in JSON or Python syntax; return `[None]` if the text has neither syntax."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not _LIST_OF_LITERALS.fullmatch(text):
        return [None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes, as in "AC\DC"
            return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [None]


@typed
@dataclass(frozen=True, kw_only=True)
class CaptionSampler:
    """Selects the texts of a clip for an epoch, depending only on the seed, the epoch and the index of the clip.

    A text is either a caption or a list of aspects. Captions alternate, so that text j of epoch e is caption
    `(e * captions_per_clip + j) % number of captions`. Each phrase of a caption between punctuation marks is left out
    with probability `caption_dropout`, but one phrase always stays, so that the model also learns short prompts.

    For a clip with aspects, a text is, with probability `aspect_prob`, a random subset of the aspects in random order,
    separated by commas. For a clip without captions, every text is a list of aspects.

    A clip with fewer than `captions_per_clip` different texts has fewer texts in an epoch.
    """

    captions_per_clip: int = 1
    aspect_prob: float = 0.5
    caption_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.captions_per_clip < 1 or self.seed < 0:
            raise ValueError(f"need captions_per_clip >= 1 and seed >= 0, got {self.captions_per_clip} and {self.seed}")
        check_shares(aspect_prob=self.aspect_prob, caption_dropout=self.caption_dropout)

    def sample(self, item: AudioItem, epoch: int, index: int) -> list[str]:
        """Select up to `captions_per_clip` different texts of a clip; no text if it has neither captions nor aspects.

        `epoch` is the number of the pass over the data, and `index` is the number of the clip; both count from 0.
        """
        captions, aspects = captions_of(item), aspects_of(item)
        rng = np.random.default_rng([self.seed, epoch, index, _TEXT_STREAM])
        texts = []
        for place in range(self.captions_per_clip):
            turn = epoch * self.captions_per_clip + place
            # Aspects follow after the last caption, unless `aspect_prob` is 0.
            needs_aspects = place >= len(captions) and (not captions or self.aspect_prob > 0)
            if aspects and (needs_aspects or rng.random() < self.aspect_prob):
                count = int(rng.integers(1, len(aspects) + 1))
                texts.append(", ".join(aspects[number] for number in rng.permutation(len(aspects))[:count]))
            elif place < len(captions):
                texts.append(_shortened(captions[turn % len(captions)], self.caption_dropout, rng))
        return list(dict.fromkeys(texts))


def _shortened(caption: str, dropout: float, rng: np.random.Generator) -> str:
    """Leave out random parts of a caption, but keep the punctuation at the end of the caption."""
    parts = _BETWEEN_PARTS.split(caption.strip()) if dropout > 0 else []
    if len(parts) < 2:
        return caption
    kept = np.flatnonzero(rng.random(len(parts)) >= dropout).tolist() or [int(rng.integers(len(parts)))]
    texts = []
    for place, following in zip(kept, [*kept[1:], len(parts)]):
        text = parts[place]
        if text.endswith(tuple(_PART_ENDS)):
            # The first mark between here and the next part that ends a sentence, if there is one.
            left_out = [parts[later] for later in range(place + 1, following)]
            ends = [part[-1] for part in left_out if part.endswith(tuple(_SENTENCE_ENDS))]
            mark = ends[0] if ends else "" if following == len(parts) else text[-1]
            text = text.rstrip(_PART_ENDS) + mark
        texts.append(text)
    return " ".join(texts)
