"""Texts as conditions: the states of a published text encoder, one for every token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from beartype import beartype

from audiolm_pytorch.conditioning.published_text import PublishedTextEncoder
from audiolm_pytorch.conditioning.tensors import ConditionTensor
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register

__all__ = ["TextConditioner"]


@register
class TextConditioner(PublishedTextEncoder):
    """The last states of a published text encoder as a condition, as MusicGen hears T5 (arXiv:2306.05284, sec. 2.3).

    The encoder is frozen and always in eval mode, whatever `train` or `requires_grad_` is called on it or around it:
    the same text gives the same states, without gradients, in float32 also under autocast. Nothing is kept from call to
    call: texts that come again are read again. Which models can be read, `PublishedTextEncoder` says. A model hub is
    asked only where one is built from a hub id; what `save_module` wrote loads without one.

    Args:
        source: Folder in transformers' format, hub id, or a model that is loaded already (it is taken over).
        tokenizer: The model's tokenizer; None = the one beside the weights in `source`.
        max_tokens: Most tokens of a text that are read, special ones included; the rest is cut off with a warning.
            None = all that the model has positions for, at most 512.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is missing, of an architecture that is not read here, not in safetensors, incomplete,
            or without a tokenizer; or if the tokenizer or `max_tokens` does not fit the model.
    """

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        tokenizer: TextTokenizer | None = None,
        max_tokens: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(source, tokenizer, max_tokens, offline=offline, revision=revision, cache_dir=cache_dir)
        self.model.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "TextConditioner":
        """Stay in eval mode: dropout would change states that nothing can adapt to."""
        return super().train(False)

    @beartype
    @torch.no_grad()
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Read texts.

        Args:
            texts: One text, or several.

        Returns:
            States `[b, t, dim]` float32, t = the longest text in tokens, with a mask `[b, t]`; past the end of a text
            they are 0. A text has the same states whatever else is in the batch.

        Raises:
            ValueError: If there is no text, or one is empty.
        """
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        mask = ids >= 0
        with torch.autocast(device.type, enabled=False):
            states = self.model(**self._text.inputs(ids)).last_hidden_state
        return ConditionTensor(states.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask)
