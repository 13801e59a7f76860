"""Published text encoders of transformers (T5, BERT, RoBERTa and their kin) as MuLaN's text tower."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning.published_text import PublishedTextEncoder
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register
from musiclm_pytorch.mulan.pooling import token_means

__all__ = ["TransformersTextEncoder"]


@register
class TransformersTextEncoder(PublishedTextEncoder):
    """One embedding per text: the mean of a published encoder's outputs over the tokens of the text.

    Models that can be read: see `PublishedTextEncoder`. Special tokens count as tokens of the text, as in sentence
    encoders that pool by the mean.

    Args:
        frozen: Whether the weights stay as they are: always in eval mode, without gradients. Otherwise they are
            fine-tuned with the rest of the MuLaN, with the dropout that the model's own settings name.
        max_seq_len: The `max_tokens` of `PublishedTextEncoder`, as the other arguments are.
    """

    @beartype
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
    ) -> None:
        where: dict[str, Any] = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
        super().__init__(source, tokenizer=tokenizer, max_tokens=max_seq_len, **where)
        self.frozen = frozen
        self.model.requires_grad_(not frozen)
        self.train(not frozen)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor besides the model and its tokenizer, JSON-able."""
        return {"frozen": self.frozen, "max_seq_len": self._text.max_tokens}

    def forward(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts.

        Args:
            texts: One text, several, or ids `[b, t]` (see `tokenize`).

        Returns:
            Tensor `[b, dim]` float32, not normalised; each row is the same whatever else is in the batch.
        """
        return self.embed_layers(texts, layers=(self.depth,))[0]

    @beartype
    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts by what stands after some of the blocks.

        Args:
            texts: As for `forward`.
            layers: Numbers of blocks, 0..depth, 0 = what goes into the first; `depth` = the output of the model, with
                the norm that some have behind their last block.

        Returns:
            Tensor `[l, b, dim]` float32: means over the tokens, not normalised.

        Raises:
            ValueError: As `tokenize`, or if a layer is not there.
        """
        if not all(0 <= layer <= self.depth for layer in layers):
            raise ValueError(f"layers must be in 0..{self.depth}, got {tuple(layers)}")
        ids = self.tokenize(texts).to(device_of(self.model))
        inner = any(layer < self.depth for layer in layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.model(**self._text.inputs(ids), output_hidden_states=inner)
            states = {self.depth: out.last_hidden_state}
            if inner:
                states = {**dict(enumerate(out.hidden_states)), **states}
            return token_means([states[layer] for layer in layers], ids >= 0)
