"""MuLan's text tower: the base class, and a small transformer over byte-pair tokens."""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from audiolm_pytorch.checks.types import keep_arguments, typed
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer, ids_of
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.nn.transformer import build_encoder
from audiolm_pytorch.saving.modules import SavedModule, register
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.mulan.layers import pooled_layers

__all__ = ["TextTower", "TextTransformer", "prompt_warnings", "report_unknown_words", "words_of"]

logger = logger_named(__name__)

# Words are letters alone; single letters do not count.
_WORD = re.compile(r"[^\W\d_]{2,}")
_WORDS_IN_WARNING = 8
# In the bundled model, "marimba without drums" and "marimba with drums" have a cosine similarity of 0.93.
_NEGATIONS = frozenset(("no", "not", "without", "never", "except"))


class TextTower(SavedModule, ABC):
    """Base class of text towers: a module of `depth` blocks that embeds texts in `dim` dimensions."""

    dim: int
    depth: int

    @abstractmethod
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Return the token ids `[b, t]` int64 of texts, -1 past the end. An empty text raises a ValueError.

        If `texts` are already token ids, the ids are checked and returned.
        """

    @abstractmethod
    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts or ids as the mean over the tokens in each of `l` layers, `[l, b, dim]` float32, not normalised.

        Layer 0 is the input of the first block, layer `depth` is the output after the final normalisation.
        """

    def forward(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed each text (or its ids), independently of the other texts, as `[b, dim]` float32, not of unit norm."""
        return self.embed_layers(texts, layers=(self.depth,))[0]


@register
class TextTransformer(TextTower):
    """Text tower with a bidirectional transformer that is trained from scratch; MuLan (arXiv:2208.12415) uses BERT.

    Args:
        num_tokens: Size of the embedding table; at least the tokenizer's vocabulary.
        max_seq_len: Number of tokens to which longer texts are truncated with a warning.
        tokenizer: Byte-pair tokenizer; None = single bytes (256 tokens, not trained).
        known_words: Words of the training captions (see `words_of`), used for a warning about prompts with other
            words in texts; None = no warning.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        num_tokens: int = 20_000,
        max_seq_len: int = 256,
        tokenizer: TextTokenizer | None = None,
        ff_mult: int = 4,
        dropout: float = 0.0,
        known_words: Sequence[str] | None = None,
    ) -> None:
        self._sizes = {k: v for k, v in locals().items() if k not in ("self", "__class__", "tokenizer", "known_words")}
        super().__init__()
        check_positive(dim=dim, num_tokens=num_tokens)
        self.tokenizer = TextTokenizer() if tokenizer is None else tokenizer
        if self.tokenizer.vocab_size > num_tokens:
            raise ValueError(f"this tokenizer needs num_tokens >= {self.tokenizer.vocab_size}, got {num_tokens}")
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1 token, got {max_seq_len}")
        self.dim, self.depth = dim, depth
        self.num_tokens, self.max_seq_len = num_tokens, max_seq_len
        self.embedding = nn.Embedding(num_tokens, dim)
        self.encoder = build_encoder(dim, depth, heads, dim_head, ff_mult, dropout)
        self.known_words = None if known_words is None else list(known_words)
        self._reported: set[str] = set()
        keep_arguments(self, self._sizes)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments, with the tokenizer as a JSON string."""
        words = {} if self.known_words is None else {"known_words": self.known_words}
        return {**self._sizes, "tokenizer": self.tokenizer.to_json(), **words}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextTransformer":
        """Build a text tower with random weights from `config`."""
        return cls(**{**config, "tokenizer": TextTokenizer.from_json(config["tokenizer"])})

    @typed
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Return the token ids `[b, t]` int64 of texts, -1 past the end; see `TextTower`."""
        return ids_of(texts, self.tokenizer, self.num_tokens, self.max_seq_len)

    @typed
    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts as the outputs `[l, b, dim]` float32 of l layers; see `TextTower`."""
        ids = self.tokenize(texts).to(self.embedding.weight.device)
        return pooled_layers(self.encoder, self.embedding(ids.clamp(min=0)), ids >= 0, layers)

    def report_unknown_words(self, texts: Sequence[str]) -> None:
        """Log the warnings of `prompt_warnings`, every word once."""
        for warning in self.prompt_warnings(texts, self._reported):
            logger.warning("%s", warning)

    def prompt_warnings(self, texts: Sequence[str], reported: set[str]) -> list[str]:
        """Return a warning for each text with words that are not in the training captions, or with a negation.

        Words in `reported` are left out, and the others are added to it. Towers without `known_words` return nothing.
        """
        known, warnings = frozenset(self.known_words or ()), []
        for text in texts if known else ():
            words = dict.fromkeys(_words(text))
            unknown = [word for word in words if word not in known | reported]
            negations = [word for word in words if word in _NEGATIONS - reported]
            reported.update(unknown, negations)
            if unknown:
                shown = ", ".join(_with_similar(word, known) for word in unknown[:_WORDS_IN_WARNING])
                shown += ", ..." if len(unknown) > _WORDS_IN_WARNING else ""
                warnings.append(f"not in the training captions, so the music may not match: {shown} (in {text!r})")
            if negations:
                warnings.append(
                    f"the music hardly depends on {negations[0]!r}; use a negative text instead (in {text!r})"
                )
        return warnings


def report_unknown_words(model: nn.Module, texts: Sequence[str]) -> None:
    """Log warnings for prompts with words that are not in the training captions of the text towers in a model."""
    for tower in model.modules():
        if isinstance(tower, TextTransformer):
            tower.report_unknown_words(texts)


def prompt_warnings(model: nn.Module, texts: Sequence[str]) -> list[str]:
    """Return the warnings that `report_unknown_words` logs, whether or not words were reported before."""
    towers = [tower for tower in model.modules() if isinstance(tower, TextTransformer)]
    return [warning for tower in towers for warning in tower.prompt_warnings(texts, set())]


def _with_similar(word: str, known: Iterable[str]) -> str:
    """Return a word, with the most similar known word if there is one."""
    similar = get_close_matches(word, known, n=1, cutoff=0.75)
    return f"{word} [{similar[0]}?]" if similar else word


@typed
def words_of(captions: Iterable[str], limit: int = 50_000) -> list[str]:
    """List the `limit` most frequent words of captions, case-folded and sorted, for `TextTransformer.known_words`."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1 word, got {limit}")
    counts = Counter(word for caption in captions for word in _words(caption))
    return sorted(sorted(counts, key=lambda word: (-counts[word], word))[:limit])


def _words(text: str) -> list[str]:
    """List the case-folded words of at least two letters in a text."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())
