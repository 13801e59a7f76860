"""MuLaN's text tower from a published text encoder of the transformers library (T5, BERT, RoBERTa and similar)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.published_text import TEXT_MODELS, PublishedTextEncoder
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register
from musiclm_pytorch.mulan.layers import token_means
from musiclm_pytorch.mulan.text_tower import TextTower

__all__ = ["TransformersTextEncoder"]


@register
class TransformersTextEncoder(PublishedTextEncoder, TextTower):
    """Text tower from a published encoder, which embeds a text as the mean over all tokens, special tokens included.

    With `frozen=False`, the encoder is trained with the MuLaN and with dropout. Texts are truncated to `max_seq_len`
    tokens. `PublishedTextEncoder` describes the arguments except `frozen` and `max_seq_len`.
    """

    published = dict.fromkeys(TEXT_MODELS, "TransformersTextEncoder")

    @typed
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        tokenizer: TextTokenizer | None = None,
        frozen: bool = True,
        max_seq_len: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        where: dict[str, Any] = dict(
            offline=offline, revision=revision, cache_dir=cache_dir, allow_noncommercial=allow_noncommercial
        )
        super().__init__(source, tokenizer=tokenizer, max_tokens=max_seq_len, **where)
        self.frozen = frozen
        self.model.requires_grad_(not frozen)
        self.train(not frozen)

    @property
    def options(self) -> dict[str, Any]:
        """JSON-able constructor arguments that are saved in addition to the model and its tokenizer."""
        return {"frozen": self.frozen, "max_seq_len": self._text.max_tokens}

    @typed
    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts as the outputs `[l, b, dim]` float32 of l layers; see `TextTower`."""
        if not all(0 <= layer <= self.depth for layer in layers):
            raise ValueError(f"layers must be in 0..{self.depth}, got {tuple(layers)}")
        ids = self.tokenize(texts).to(device_of(self.model))
        inner = any(layer < self.depth for layer in layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.model(**self._text.inputs(ids), output_hidden_states=inner)
            # The last of `hidden_states` lacks the final norm that some models have.
            states = {**(dict(enumerate(out.hidden_states)) if inner else {}), self.depth: out.last_hidden_state}
            return token_means([states[layer] for layer in layers], ids >= 0)
