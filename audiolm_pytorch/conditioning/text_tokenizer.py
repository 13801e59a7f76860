"""Texts to ids: a byte-level BPE for captions in which nothing is unknown, and tokenizers of others."""

import logging
from collections.abc import Iterable, Sequence

import torch
from beartype import beartype
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["PADDING", "TextTokenizer", "checked_ids", "ids_of"]

logger = logging.getLogger(__name__)

PADDING = -1
"""What stands past the end of a text in a batch of ids; no id, so that no token of the vocabulary is lost to it."""

_NUM_BYTES = 256


class TextTokenizer:
    """A tokenizer of captions: ours, or that of a published text encoder.

    Ours is a byte-level byte-pair encoder (arXiv:1508.07909, on bytes) over lower-cased, NFC-normalised text. All 256
    bytes are in every vocabulary, so nothing is ever unknown, in any script. Either way, white space is collapsed
    first: how a caption is broken into lines changes nothing.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library; None = the bare byte alphabet without a single merge.
        special_tokens: Whether each text gets the tokens around it that the tokenizer's post-processor knows ([CLS] and
            [SEP] of BERT, </s> of T5): published encoders were trained with them.
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer | None = None, *, special_tokens: bool = False) -> None:
        self._tokenizer = _untrained() if tokenizer is None else tokenizer
        self.special_tokens = special_tokens

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
    def from_json(cls, text: str, *, special_tokens: bool = False) -> "TextTokenizer":
        """Read what `to_json` wrote; ValueError when it is not a tokenizer."""
        try:
            return cls(Tokenizer.from_str(text), special_tokens=special_tokens)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"not the JSON of a tokenizer: {error}") from error

    def to_json(self) -> str:
        """The whole tokenizer as one JSON string."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are in [0, vocab_size)."""
        return self._tokenizer.get_vocab_size()

    @property
    def num_special_tokens(self) -> int:
        """How many tokens are put around a text."""
        return self._tokenizer.num_special_tokens_to_add(False) if self.special_tokens else 0

    @beartype
    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tensor:
        """Turn texts into a batch of ids.

        Args:
            texts: Texts, none of them empty or blank.
            max_tokens: Longer texts lose their end (special tokens stay), with a warning in the log. None = no limit.

        Returns:
            Tensor `[b, t]` int64, t = the longest text in tokens, shorter ones end in -1 (`PADDING`).

        Raises:
            TypeError: If one is no text.
            ValueError: If there is no text, or one is empty.
        """
        if isinstance(texts, str):
            texts = [texts]
        others = [(index, type(text).__name__) for index, text in enumerate(texts) if not isinstance(text, str)]
        if others:  # beartype looks at one item of a sequence
            raise TypeError(f"texts must be str, got {others[0][1]} at index {others[0][0]} of {len(texts)}")
        cleaned = [_clean(text) for text in texts]
        if not cleaned:
            raise ValueError("got an empty list of texts, need at least one")
        empty = [index for index, text in enumerate(cleaned) if not text]
        if empty:
            raise ValueError(f"text at index {empty[0]} of {len(cleaned)} is empty: say at least one word")
        encodings = self._tokenizer.encode_batch(cleaned, add_special_tokens=False)
        num_special = self.num_special_tokens
        longest = num_special + max(map(len, encodings))
        if max_tokens is not None and longest > max_tokens:
            logger.warning("text of %d tokens truncated to the %d that are read", longest, max_tokens)
            for encoding in encodings:
                encoding.truncate(max_tokens - num_special)
        if self.special_tokens:
            encodings = [self._tokenizer.post_process(encoding) for encoding in encodings]
        tensors = [torch.tensor(encoding.ids, dtype=torch.long) for encoding in encodings]
        return pad_sequence(tensors, batch_first=True, padding_value=PADDING)

    @beartype
    def decode(self, ids: Tensor) -> list[str]:
        """Texts of ids `[b, t]`, as normalised; padding is skipped and bytes that are no UTF-8 become U+FFFD."""
        return [self._tokenizer.decode(row[row >= 0].tolist()).strip() for row in ids]


def ids_of(texts: str | Sequence[str] | Tensor, tokenizer: TextTokenizer, num_tokens: int, max_tokens: int) -> Tensor:
    """Give the ids `[b, t]` of what a text encoder was given: one text, several, or ids, which are checked.

    Args:
        texts: One text, several, or ids `[b, t]`.
        tokenizer: Turns texts into ids.
        num_tokens: Size of the embedding table.
        max_tokens: Most tokens that the encoder reads.

    Raises:
        ValueError: If a text is empty, or ids are none that the encoder can read.
    """
    if isinstance(texts, Tensor):
        return checked_ids(texts, num_tokens, max_tokens)
    return tokenizer.encode([texts] if isinstance(texts, str) else texts, max_tokens)


def checked_ids(ids: Tensor, num_tokens: int, max_tokens: int) -> Tensor:
    """Refuse what is no batch of ids `[b, t]` in [0, num_tokens) with -1 past the end of a text; int64.

    Raises:
        ValueError: If ids are no integers, out of range, more than `max_tokens` a text or behind its end, or a text has
            none.
    """
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] > max_tokens:
        raise ValueError(f"ids must be integers [b, t <= {max_tokens}], got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() == 0 or not (ids >= 0).any(dim=1).all():
        raise ValueError("a text without a single token cannot be embedded")
    if int(ids.max()) >= num_tokens or int(ids.min()) < PADDING:
        span = f"{int(ids.min())}..{int(ids.max())}"
        raise ValueError(f"ids must be in 0..{num_tokens - 1}, or -1 past the end; got {span}")
    if bool(((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any()):
        raise ValueError("ids follow after a -1, which marks the end of a text: pad texts on the right")
    return ids.long()


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
