"""Text tokenizers: a trainable byte-level BPE for captions, and the tokenizers of published text encoders."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.saving.tokenizer_json import rust_errors, tokenizer_of_json

__all__ = ["PADDING", "TextTokenizer", "ids_of"]

logger = logger_named(__name__)

PADDING = -1  # value past the end of a text in a batch of ids
_NUM_BYTES = 256


class TextTokenizer:
    """Tokenizer of texts that first replaces consecutive white space by one space.

    `TextTokenizer.train` trains a byte-level byte-pair encoding (arXiv:1508.07909) of texts in lower case and Unicode
    form NFC. The trained vocabulary contains all 256 bytes, so that no text has unknown tokens.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library; None = every byte is one token.
        special_tokens: Whether to add the special tokens of a published text encoder (`[CLS]` and `[SEP]` for BERT,
            `</s>` for T5).
    """

    @typed
    def __init__(self, tokenizer: Tokenizer | None = None, *, special_tokens: bool = False) -> None:
        self.tokenizer = _untrained() if tokenizer is None else tokenizer
        self.special_tokens = special_tokens

    @classmethod
    @typed
    def train(cls, captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2) -> "TextTokenizer":
        """Train a tokenizer on captions. Equal captions result in equal tokenizers on every machine.

        The vocabulary has at most `vocab_size` tokens, and at least 256, because every byte is a token. Pairs of tokens
        with fewer than `min_frequency` occurrences are not merged.
        """
        if vocab_size < _NUM_BYTES:
            raise ValueError(f"vocab_size must be at least {_NUM_BYTES}, the number of bytes; got {vocab_size}")
        if min_frequency < 0:
            raise ValueError(f"min_frequency must be at least 0, got {min_frequency}")
        texts = [_clean(caption) for caption in captions]
        if not any(texts):
            raise ValueError("got no caption to train a tokenizer on; pass at least one caption that is not empty")
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
    @typed
    def from_json(cls, text: str, *, special_tokens: bool = False) -> "TextTokenizer":
        """Build a tokenizer from the string that `to_json` returned."""
        return cls(tokenizer_of_json(text), special_tokens=special_tokens)

    def to_json(self) -> str:
        """Return the tokenizer as a JSON string for `from_json`."""
        return self.tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; ids are in [0, vocab_size)."""
        return self.tokenizer.get_vocab_size()

    @property
    def num_special_tokens(self) -> int:
        """Number of special tokens that are added to every text."""
        return self.tokenizer.num_special_tokens_to_add(False) if self.special_tokens else 0

    @typed
    def encode(self, texts: str | Sequence[str], max_tokens: int | None = None) -> Tensor:
        """Return token ids `[b, t]` int64 of texts, padded with -1 (`PADDING`) to the length t of the longest text.

        A text with more than `max_tokens` tokens is truncated with a warning; its special tokens are kept.
        """
        if isinstance(texts, str):
            texts = [texts]
        for index, text in enumerate(texts):  # `typed` checks only one item of a sequence
            if not isinstance(text, str):
                raise TypeError(f"texts must be str, got {type(text).__name__} at index {index} of {len(texts)}")
        cleaned = [_clean(text) for text in texts]
        if not cleaned:
            raise ValueError("got an empty list of texts; pass at least one text")
        empty = [index for index, text in enumerate(cleaned) if not text]
        if empty:
            raise ValueError(f"text {empty[0]} of {len(cleaned)} is empty; every text needs at least one word")
        with rust_errors("the tokenizer cannot encode these texts"):
            encodings = self.tokenizer.encode_batch(cleaned, add_special_tokens=False)
        num_special = self.num_special_tokens
        longest = num_special + max(map(len, encodings))
        if max_tokens is not None and longest > max_tokens:
            logger.warning("a text of %d tokens is truncated to max_tokens=%d", longest, max_tokens)
            for encoding in encodings:
                encoding.truncate(max_tokens - num_special)
        if self.special_tokens:
            encodings = [self.tokenizer.post_process(encoding) for encoding in encodings]
        tensors = [torch.tensor(encoding.ids, dtype=torch.long) for encoding in encodings]
        return pad_sequence(tensors, batch_first=True, padding_value=PADDING)

    @typed
    def decode(self, ids: Tensor) -> list[str]:
        """Decode token ids `[b, t]`, padded with -1, to normalised texts. Bytes that are not UTF-8 become U+FFFD."""
        return [self.tokenizer.decode(row[row >= 0].tolist()).strip() for row in ids]


def ids_of(texts: str | Sequence[str] | Tensor, tokenizer: TextTokenizer, num_tokens: int, max_tokens: int) -> Tensor:
    """Return token ids `[b, t]` int64 of one or several texts, padded with -1.

    If `texts` are token ids, the ids are checked; `num_tokens` is the number of token embeddings of the text encoder.
    """
    if isinstance(texts, Tensor):
        return _checked_ids(texts, num_tokens, max_tokens)
    ids = tokenizer.encode([texts] if isinstance(texts, str) else texts, max_tokens)
    if int(ids.max()) >= num_tokens:
        raise ValueError(f"the tokenizer returned the id {int(ids.max())}, but the text encoder has {num_tokens} ids")
    return ids


def _checked_ids(ids: Tensor, num_tokens: int, max_tokens: int) -> Tensor:
    """Check that each row of ids `[b, t]` has one or more ids in [0, num_tokens), followed only by -1."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] > max_tokens:
        raise ValueError(f"text ids must be integers [b, t] with t <= {max_tokens}, got {ids.dtype} {tuple(ids.shape)}")
    if is_traced():
        return ids.long()
    if ids.numel() == 0 or not (ids >= 0).any(dim=1).all():
        raise ValueError("got a row of text ids that are all -1 (padding); pass at least one id per text")
    if int(ids.max()) >= num_tokens or int(ids.min()) < PADDING:
        id_range = f"{int(ids.min())}..{int(ids.max())}"
        raise ValueError(f"text ids must be in 0..{num_tokens - 1}, or -1 for padding; got ids in {id_range}")
    if bool(((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any()):
        raise ValueError("got text ids after a -1, which is padding; pad on the right")
    return ids.long()


def _clean(text: str) -> str:
    """Collapse white space in a text, and replace lone surrogates, which UTF-8 cannot encode."""
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())


def _untrained() -> Tokenizer:
    """Build a tokenizer without merges, so that every byte is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    # lower-casing comes before NFC, because lower-casing can undo NFC
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])
    # a leading space gives a word the same tokens at the start of a text as inside
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
