"""Text tokenizers: a trainable byte-level BPE for captions, and those of published text encoders."""

import logging
from collections.abc import Iterable, Sequence

import torch
from beartype import beartype
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["PADDING", "TextTokenizer", "ids_of"]

logger = logging.getLogger(__name__)

PADDING = -1
"""Value past the end of a text in a batch of ids."""

_NUM_BYTES = 256


class TextTokenizer:
    """A tokenizer of captions; runs of white space count as one space.

    `TextTokenizer.train` makes a byte-level byte-pair encoder (arXiv:1508.07909, on bytes) of lower-cased,
    NFC-normalised text. Its vocabulary contains all 256 bytes, so no text has unknown tokens.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library; None = bytes without merges.
        special_tokens: Whether to add the special tokens of the tokenizer's post-processor ([CLS] and [SEP] of BERT,
            </s> of T5), with which published encoders were trained.
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer | None = None, *, special_tokens: bool = False) -> None:
        self._tokenizer = _untrained() if tokenizer is None else tokenizer
        self.special_tokens = special_tokens

    @classmethod
    @beartype
    def train(cls, captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2) -> "TextTokenizer":
        """Learn merges from captions; equal captions give equal tokenizers on every machine.

        Args:
            captions: Texts to learn from, at least one of them not empty.
            vocab_size: Largest size of the vocabulary, at least 256 (the bytes).
            min_frequency: Occurrences that a pair needs to be merged.
        """
        if vocab_size < _NUM_BYTES:
            raise ValueError(f"vocab_size must be at least {_NUM_BYTES}, the number of bytes; got {vocab_size}")
        texts = [_clean(caption) for caption in captions]
        if not any(texts):
            raise ValueError("no text to train a tokenizer on: pass at least one caption that is not empty")
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
        """Build the tokenizer that `to_json` described."""
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
        """Number of special tokens added to a text."""
        return self._tokenizer.num_special_tokens_to_add(False) if self.special_tokens else 0

    @beartype
    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tensor:
        """Return the ids `[b, t]` int64 of texts, t = tokens of the longest text, padded with -1 (`PADDING`).

        Args:
            texts: At least one text, none of them empty or blank.
            max_tokens: Longer texts are truncated with a warning; special tokens stay. None = no limit.
        """
        if isinstance(texts, str):
            texts = [texts]
        for index, text in enumerate(texts):  # beartype checks only one item of a sequence
            if not isinstance(text, str):
                raise TypeError(f"texts must be str, got {type(text).__name__} at index {index} of {len(texts)}")
        cleaned = [_clean(text) for text in texts]
        if not cleaned:
            raise ValueError("got an empty list of texts, pass at least one")
        empty = [index for index, text in enumerate(cleaned) if not text]
        if empty:
            raise ValueError(f"text at index {empty[0]} of {len(cleaned)} is empty: pass at least one word")
        encodings = self._tokenizer.encode_batch(cleaned, add_special_tokens=False)
        num_special = self.num_special_tokens
        longest = num_special + max(map(len, encodings))
        if max_tokens is not None and longest > max_tokens:
            logger.warning("text of %d tokens truncated to %d tokens", longest, max_tokens)
            for encoding in encodings:
                encoding.truncate(max_tokens - num_special)
        if self.special_tokens:
            encodings = [self._tokenizer.post_process(encoding) for encoding in encodings]
        tensors = [torch.tensor(encoding.ids, dtype=torch.long) for encoding in encodings]
        return pad_sequence(tensors, batch_first=True, padding_value=PADDING)

    @beartype
    def decode(self, ids: Tensor) -> list[str]:
        """Return the normalised texts of ids `[b, t]`, without padding; bytes that are not UTF-8 become U+FFFD."""
        return [self._tokenizer.decode(row[row >= 0].tolist()).strip() for row in ids]


def ids_of(texts: str | Sequence[str] | Tensor, tokenizer: TextTokenizer, num_tokens: int, max_tokens: int) -> Tensor:
    """Return the ids `[b, t]` int64 of one text or several; ids `[b, t]` are checked and returned.

    Args:
        texts: One text, several, or ids with -1 past the end of a text.
        tokenizer: The tokenizer of the text encoder.
        num_tokens: Size of the encoder's embedding table.
        max_tokens: Most tokens of a text that the encoder reads.
    """
    if isinstance(texts, Tensor):
        return _checked_ids(texts, num_tokens, max_tokens)
    return tokenizer.encode([texts] if isinstance(texts, str) else texts, max_tokens)


def _checked_ids(ids: Tensor, num_tokens: int, max_tokens: int) -> Tensor:
    """Check ids `[b, t]` in [0, num_tokens), at least one per text, with -1 past the end of a text."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] > max_tokens:
        raise ValueError(f"ids must be integers [b, t <= {max_tokens}], got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() == 0 or not (ids >= 0).any(dim=1).all():
        raise ValueError("every text needs at least one token, got a row of ids that are all -1")
    if int(ids.max()) >= num_tokens or int(ids.min()) < PADDING:
        span = f"{int(ids.min())}..{int(ids.max())}"
        raise ValueError(f"ids must be in 0..{num_tokens - 1}, or -1 past the end; got {span}")
    if bool(((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any()):
        raise ValueError("ids follow a -1, which marks the end of a text: pad on the right")
    return ids.long()


def _clean(text: str) -> str:
    """Collapse white space, and replace lone surrogates, which UTF-8 cannot encode."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())


def _untrained() -> Tokenizer:
    """Build the tokenizer of bytes without merges. Lower-casing is first, because it can undo NFC compositions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    # a leading space gives a word the same tokens at the start of a text as inside
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
