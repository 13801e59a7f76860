"""The words that a text tower was trained on, and what is said of texts that are made of others."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from beartype import beartype

__all__ = ["SeenWords", "words_of"]

logger = logging.getLogger(__name__)

# Letters alone: digits and signs are no words, and a single letter says nothing.
_WORD = re.compile(r"[^\W\d_]{2,}")
_WORDS_NAMED = 8


@beartype
def words_of(captions: Iterable[str], most: int = 50_000) -> list[str]:
    """Collect the words of captions, as `SeenWords` needs them.

    Args:
        captions: Texts.
        most: How many words to keep, the most frequent ones.

    Returns:
        Case-folded words of at least two letters, in alphabetical order.

    Raises:
        ValueError: If `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1 word, got {most}")
    counts = Counter(word for caption in captions for word in _words(caption))
    return sorted(sorted(counts, key=lambda word: (-counts[word], word))[:most])


class SeenWords:
    """The words that a text tower was trained on; tells, once a text, when most of its words are others.

    Such a text has an embedding like any other, and music comes out of it: nobody would see that it was not understood.

    Args:
        words: Case-folded words (see `words_of`).
    """

    @beartype
    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._known = frozenset(self.words)
        self._warned: set[str] = set()

    @beartype
    def warn_of(self, texts: Sequence[str]) -> None:
        """Log a warning for each text, not warned of before, of whose words more than half were never seen."""
        for text in texts:
            words = list(dict.fromkeys(_words(text)))
            unseen = [word for word in words if word not in self._known]
            if 2 * len(unseen) <= len(words) or text in self._warned:
                continue
            self._warned.add(text)
            named = ", ".join(unseen[:_WORDS_NAMED]) + (", ..." if len(unseen) > _WORDS_NAMED else "")
            logger.warning(
                "%d of the %d words of %r were never seen in training, so the music may have little to do with it: %s",
                *(len(unseen), len(words), text, named),
            )


def _words(text: str) -> list[str]:
    """Words of a text, case-folded."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())
