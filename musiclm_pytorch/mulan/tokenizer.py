"""Byte-level BPE for captions: every text has an encoding, the whole tokenizer is one JSON string."""

import logging
from collections.abc import Iterable, Sequence

import torch
from beartype import beartype
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["PADDING", "TextTokenizer"]

logger = logging.getLogger(__name__)

PADDING = -1
"""What stands past the end of a text in a batch of ids; no id, so that no token of the vocabulary is lost to it."""

_NUM_BYTES = 256


class TextTokenizer:
    """A byte-level byte-pair encoder (arXiv:1508.07909, on bytes) over lower-cased, NFC-normalised text.

    All 256 bytes are in every vocabulary, so nothing is ever unknown, in any script.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library; None = the bare byte alphabet without a single merge.
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = _untrained() if tokenizer is None else tokenizer

    @classmethod
    @beartype
    def train(cls, captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2) -> "TextTokenizer":
        """Learn merges from captions.

        Args:
            captions: Texts to learn from.
            vocab_size: Most tokens the vocabulary may hold, at least 256 (the bytes).
            min_frequency: How often a pair must be seen to be merged.

        Returns:
            TextTokenizer: Equal for equal captions, whatever the machine.

        Raises:
            ValueError: If `vocab_size` is below 256 or all captions are empty.
        """
        if vocab_size < _NUM_BYTES:
            raise ValueError(f"vocab_size must be at least {_NUM_BYTES}, the number of bytes; got {vocab_size}")
        texts = [_clean(caption) for caption in captions]
        if not any(texts):
            raise ValueError("no text to train a tokenizer on: give at least one caption that is not empty")
        tokenizer = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        return cls(tokenizer)

    @classmethod
    @beartype
    def from_json(cls, text: str) -> "TextTokenizer":
        """Read what `to_json` wrote; ValueError when it is not a tokenizer."""
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"not the JSON of a tokenizer: {error}") from error

    def to_json(self) -> str:
        """The whole tokenizer as one JSON string."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are in [0, vocab_size)."""
        return self._tokenizer.get_vocab_size()

    @beartype
    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tensor:
        """Turn texts into a batch of ids.

        Args:
            texts: Texts, none of them empty or blank.
            max_tokens: Longer texts lose their end, with a warning in the log. None = no limit.

        Returns:
            Tensor `[b, t]` int64, t = the longest text in tokens, shorter ones end in -1 (`PADDING`).

        Raises:
            ValueError: If there is no text, or one is empty.
        """
        if isinstance(texts, str):
            texts = [texts]
        cleaned = [_clean(text) for text in texts]
        if not cleaned:
            raise ValueError("got an empty list of texts, need at least one")
        empty = [index for index, text in enumerate(cleaned) if not text]
        if empty:
            raise ValueError(f"text at index {empty[0]} of {len(cleaned)} is empty: say at least one word")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(cleaned, add_special_tokens=False)]
        if max_tokens is not None and max(map(len, rows)) > max_tokens:
            longest = max(map(len, rows))
            logger.warning("text of %d tokens truncated to the %d that the text tower reads", longest, max_tokens)
            rows = [row[:max_tokens] for row in rows]
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=PADDING)

    @beartype
    def decode(self, ids: Tensor) -> list[str]:
        """Texts of ids `[b, t]`, as normalised; padding is skipped and bytes that are no UTF-8 become U+FFFD."""
        return [self._tokenizer.decode(row[row >= 0].tolist()).strip() for row in ids]


def _clean(text: str) -> str:
    """Collapse white space; replace lone surrogates, which no UTF-8 encoder accepts."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())


def _untrained() -> Tokenizer:
    """Byte alphabet without merges; lower case first, because lower-casing can undo a composition that NFC made."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    # a leading space makes the first word of a text the same tokens as that word further on
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
