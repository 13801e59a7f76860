"""MuLan's text tower: what any has to offer, and ours, a small bidirectional transformer over byte-pair tokens."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer, ids_of
from audiolm_pytorch.nn.encoder import TransformerEncoder
from audiolm_pytorch.saving.modules import register
from musiclm_pytorch.mulan.pooling import pooled_layers
from musiclm_pytorch.mulan.seen_words import SeenWords

__all__ = ["TextTower", "TextTransformer"]


@runtime_checkable
class TextTower(Protocol):
    """A module that embeds texts: `TextTransformer`, `TransformersTextEncoder`, or one of your own."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        ...

    @property
    def depth(self) -> int:
        """Number of blocks: the last layer that `embed_layers` knows."""
        ...

    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts, -1 past the end of each; ids given are checked and passed on."""
        ...

    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts `[l, b, dim]` float32 by what stands after some of the blocks, 0..depth."""
        ...

    def forward(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts `[b, dim]` float32, not normalised: the last layer's row of `embed_layers`."""
        ...


@register
class TextTransformer(nn.Module):
    """One embedding per text: the mean of a transformer's outputs over its tokens.

    The place of BERT in MuLan (arXiv:2208.12415, sec. 3.2), trained from nothing.

    Args:
        dim: Width of the tokens and of the output.
        depth: Transformer blocks.
        heads: Attention heads.
        dim_head: Width of a head, even.
        num_tokens: Size of the embedding table; at least the tokenizer's vocabulary.
        max_seq_len: Most tokens of a text that are read; the rest is cut off with a warning.
        tokenizer: Turns strings into ids; None = plain bytes (256 tokens, nothing to train).
        ff_mult: Width of the feed-forward over `dim`.
        dropout: Probability of dropping in training.
        known_words: Words of the training captions (see `words_of`): in eval mode, a text that is mostly made of others
            is reported in the log. None = not known, and nothing is reported.

    Raises:
        ValueError: If the tokenizer has more tokens than `num_tokens`.
    """

    @beartype
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
        super().__init__()
        self.tokenizer = TextTokenizer() if tokenizer is None else tokenizer
        if self.tokenizer.vocab_size > num_tokens:
            raise ValueError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, num_tokens is only {num_tokens}")
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1 token, got {max_seq_len}")
        self.dim, self.depth = dim, depth
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self._sizes = {
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "dim_head": dim_head,
            "num_tokens": num_tokens,
            "max_seq_len": max_seq_len,
            "ff_mult": ff_mult,
            "dropout": dropout,
        }
        self.embedding = nn.Embedding(num_tokens, dim)
        self.encoder = TransformerEncoder(dim, depth, heads, dim_head, ff_mult, dropout)
        self.known_words = known_words

    @property
    def known_words(self) -> list[str] | None:
        """Words of the training captions, or None; may be set."""
        return None if self._seen is None else self._seen.words

    @known_words.setter
    def known_words(self, words: Sequence[str] | None) -> None:
        self._seen = None if words is None else SeenWords(words)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able; the tokenizer as its JSON string."""
        words = {} if self._seen is None else {"known_words": self._seen.words}
        return {**self._sizes, "tokenizer": self.tokenizer.to_json(), **words}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextTransformer":
        """Build from `config`; the weights are new."""
        return cls(**{**config, "tokenizer": TextTokenizer.from_json(config["tokenizer"])})

    @beartype
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts, -1 past the end of each; ids given are checked and passed on.

        Args:
            texts: One text, several, or ids `[b, t]` in [0, num_tokens) with -1 after the end of a shorter text.

        Raises:
            ValueError: If a text is empty, or ids are out of range, longer than `max_seq_len` or all padding.
        """
        ids = ids_of(texts, self.tokenizer, self.num_tokens, self.max_seq_len)
        if self._seen is not None and not self.training and not isinstance(texts, Tensor):
            self._seen.warn_of([texts] if isinstance(texts, str) else texts)
        return ids

    def forward(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts.

        Args:
            texts: One text, several, or ids `[b, t]` (see `tokenize`).

        Returns:
            Tensor `[b, dim]` float, not normalised; each row is the same whatever else is in the batch.
        """
        return self.embed_layers(texts, layers=(self.depth,))[0]

    @beartype
    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts by what stands after some of the blocks.

        Args:
            texts: As for `forward`.
            layers: Numbers of blocks, 0..depth; `depth` stands for the normalised output.

        Returns:
            Tensor `[l, b, dim]` float32: means over the tokens, not normalised.

        Raises:
            ValueError: As `tokenize`, or if a layer is not there.
        """
        ids = self.tokenize(texts).to(self.embedding.weight.device)
        mask = ids >= 0
        return pooled_layers(self.encoder, self.embedding(ids.clamp(min=0)), mask, layers)
