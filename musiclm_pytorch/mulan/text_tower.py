"""MuLan's text tower: a small bidirectional transformer over byte-pair tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from beartype import beartype
from einops import reduce
from torch import Tensor, nn

from audiolm_pytorch.encoder import TransformerEncoder
from audiolm_pytorch.io import register
from musiclm_pytorch.mulan.tokenizer import TextTokenizer

__all__ = ["TextTransformer"]


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
    ) -> None:
        super().__init__()
        self.tokenizer = TextTokenizer() if tokenizer is None else tokenizer
        if self.tokenizer.vocab_size > num_tokens:
            raise ValueError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, num_tokens is only {num_tokens}")
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1 token, got {max_seq_len}")
        self.dim = dim
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

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able; the tokenizer as its JSON string."""
        return {**self._sizes, "tokenizer": self.tokenizer.to_json()}

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
        if not isinstance(texts, Tensor):
            return self.tokenizer.encode([texts] if isinstance(texts, str) else texts, self.max_seq_len)
        if texts.ndim != 2 or texts.is_floating_point() or texts.shape[1] > self.max_seq_len:
            raise ValueError(
                f"ids must be integers [b, t <= {self.max_seq_len}], got {texts.dtype} {tuple(texts.shape)}"
            )
        if texts.numel() == 0 or not (texts >= 0).any(dim=1).all():
            raise ValueError("a text without a single token cannot be embedded")
        if int(texts.max()) >= self.num_tokens or int(texts.min()) < -1:
            span = f"{int(texts.min())}..{int(texts.max())}"
            raise ValueError(f"ids must be in 0..{self.num_tokens - 1}, or -1 past the end; got {span}")
        return texts.long()

    def forward(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts.

        Args:
            texts: One text, several, or ids `[b, t]` (see `tokenize`).

        Returns:
            Tensor `[b, dim]` float, not normalised; each row is the same whatever else is in the batch.
        """
        ids = self.tokenize(texts).to(self.embedding.weight.device)
        mask = ids >= 0
        tokens = self.embedding(ids.clamp(min=0))
        encoded = self.encoder(tokens, None if bool(mask.all()) else mask)
        encoded = encoded.float() * mask.unsqueeze(-1)
        return reduce(encoded, "b t d -> b d", "sum") / torch.sum(mask, dim=1, keepdim=True)
