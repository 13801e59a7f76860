"""Which words describe a clip: its captions and aspects, and what of them training sees in an epoch."""

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from beartype import beartype

from audiolm_pytorch.data.captions import is_encodable, texts_in
from audiolm_pytorch.data.manifest import AudioItem, captions_of

__all__ = ["CaptionSampler", "aspects_of", "parse_aspects", "texts_of"]

ASPECT_LABELS = ("aspects", "aspect_list")
MAX_ASPECT_CHARACTERS = 2**16
# A text of Python or JSON. Lists of them are recognised before Python's parser, which deep nesting can crash, sees any.
_LITERAL = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
_LIST_OF_LITERALS = re.compile(rf"\[\s*(?:{_LITERAL}\s*(?:,\s*{_LITERAL}\s*)*,?\s*)?\]")
# A comma or the end of a sentence, and white space behind it: neither 1,000 nor 4.5 is two parts.
_BETWEEN_PARTS = re.compile(r"(?<=[,;.!?])\s+")
_SENTENCE_ENDS, _PART_ENDS = ".!?", ",;"
# The crops of a clip are drawn from [seed, epoch, index]: words must not go with positions.
_WORDS_STREAM = 0x776F7264


@beartype
def aspects_of(item: AudioItem) -> list[str]:
    """List the aspects of an item, such as "slow tempo" or "piano": its labels `aspects` and `aspect_list`.

    Args:
        item: A label may be a list of texts, or one text as `parse_aspects` reads it.

    Returns:
        The aspects in their order, each once.

    Raises:
        ValueError: If a text begins as a list and is none; the message names the file.
    """
    aspects: list[str] = []
    for name in ASPECT_LABELS:
        value = item.labels.get(name)
        try:
            aspects += parse_aspects(value) if isinstance(value, str) else texts_in(value)
        except ValueError as error:
            raise ValueError(f"{item.path}: label {name!r}: {error}") from error
    return list(dict.fromkeys(aspects))


@beartype
def texts_of(item: AudioItem) -> list[str]:
    """List every text that describes an item: its captions, or if it has none, all its aspects in one text.

    Args:
        item: Any.

    Returns:
        What retrieval, tokenizers and quantizers may take; empty if nothing is said about the item.
    """
    return captions_of(item) or texts_in(", ".join(aspects_of(item)))


@beartype
def parse_aspects(text: str) -> list[str]:
    """Read an aspect list as tables hold it; nothing in it is run.

    Args:
        text: A list in JSON or, as in MusicCaps, in Python (`['slow tempo', "children's song"]`); or aspects with
            commas between (`slow tempo, piano`).

    Returns:
        The aspects without white space around them, blank ones left out.

    Raises:
        ValueError: If the text begins as a list and is none of texts.
    """
    text = text.strip()
    if len(text) > MAX_ASPECT_CHARACTERS:
        raise ValueError(f"an aspect list of {len(text)} characters, at most {MAX_ASPECT_CHARACTERS} are read")
    aspects = _listed(text) if text.startswith("[") else text.split(",")
    if not all(isinstance(aspect, str) and is_encodable(aspect) for aspect in aspects):
        raise ValueError(f"not a list of texts: {ascii(text)[:100]}; write ['slow tempo', 'piano']")
    return [aspect.strip() for aspect in aspects if aspect.strip()]


def _listed(text: str) -> list[Any]:
    """The entries of a list in JSON or Python; [None] if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not _LIST_OF_LITERALS.fullmatch(text):
        return [None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that begin no escape, as in "AC\DC"
            return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [None]


@beartype
@dataclass(frozen=True, kw_only=True)
class CaptionSampler:
    """What a clip is called in an epoch: a pure function of the seed, the epoch and the index of the clip.

    Each of the clip's texts is either one of its captions or a list of its aspects:

    - Captions take turns: text j of epoch e is caption `(e * captions_per_clip + j) % number of captions`, so that all
      are seen equally often, beginning with the first. With `caption_dropout`, every part of a caption (what stands
      between commas and ends of sentences) is left out with that probability, one stays: short prompts are learnt too.
    - Where the clip has aspects, a text is with `aspect_prob` a random subset of them, of any size, in random order
      with commas between. A clip without captions is described by aspects alone, whatever the probability.

    With one caption, no aspects and the numbers left as they are, the text is that caption.

    Attributes:
        captions_per_clip: Texts a clip and epoch; a clip that has fewer gives fewer, never the same one twice.
        aspect_prob: Probability of aspects in place of a caption, in 0..1.
        caption_dropout: Probability of leaving out a part of a caption, in 0..1.
        seed: Seed of the aspects and of the dropout, not negative.

    Raises:
        ValueError: If a number is out of range.
    """

    captions_per_clip: int = 1
    aspect_prob: float | int = 0.5
    caption_dropout: float | int = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.captions_per_clip < 1 or self.seed < 0:
            raise ValueError(f"need captions_per_clip >= 1 and seed >= 0, got {self.captions_per_clip}, {self.seed}")
        if not (0 <= self.aspect_prob <= 1 and 0 <= self.caption_dropout <= 1):
            raise ValueError(
                f"need aspect_prob and caption_dropout in 0..1, got {self.aspect_prob}, {self.caption_dropout}"
            )

    def sample(self, item: AudioItem, epoch: int, index: int) -> list[str]:
        """Draw the texts of a clip.

        Args:
            item: The clip.
            epoch: Pass over the data, from 0.
            index: Index of the clip in the data.

        Returns:
            At most `captions_per_clip` texts, all different; none if nothing is said about the clip.

        Raises:
            ValueError: If epoch or index are negative, or an aspect list cannot be read (its file is named).
        """
        if epoch < 0 or index < 0:
            raise ValueError(f"need epoch >= 0 and index >= 0, got {epoch}, {index}")
        captions, aspects = captions_of(item), aspects_of(item)
        random = np.random.default_rng([self.seed, epoch, index, _WORDS_STREAM])
        texts = []
        for place in range(self.captions_per_clip):
            turn = epoch * self.captions_per_clip + place
            # where captions have run out aspects may follow, unless they are not wanted at all
            spare = place >= len(captions) and (not captions or self.aspect_prob > 0)
            if aspects and (spare or random.random() < self.aspect_prob):
                texts.append(_some_aspects(aspects, random))
            elif place < len(captions):
                texts.append(_shortened(captions[turn % len(captions)], self.caption_dropout, random))
        return list(dict.fromkeys(texts))


def _some_aspects(aspects: list[str], random: np.random.Generator) -> str:
    """At least one of the aspects, in random order."""
    count = int(random.integers(1, len(aspects) + 1))
    return ", ".join(aspects[place] for place in random.permutation(len(aspects))[:count])


def _shortened(caption: str, dropout: float, random: np.random.Generator) -> str:
    """A caption without some of its parts; sentences still end where parts behind were left out."""
    parts = _BETWEEN_PARTS.split(caption.strip()) if dropout > 0 else []
    if len(parts) < 2:
        return caption
    kept = np.flatnonzero(random.random(len(parts)) >= dropout).tolist() or [int(random.integers(len(parts)))]
    texts = []
    for place, following in zip(kept, [*kept[1:], len(parts)]):
        text = parts[place]
        if text.endswith(tuple(_PART_ENDS)):
            # of the marks from here to the next part that stays, the first that ends a sentence, if one does
            left_out = [parts[later] for later in range(place + 1, following)]
            ends = [part[-1] for part in left_out if part.endswith(tuple(_SENTENCE_ENDS))]
            mark = ends[0] if ends else "" if following == len(parts) else text[-1]
            text = text.rstrip(_PART_ENDS) + mark
        texts.append(text)
    return " ".join(texts)
