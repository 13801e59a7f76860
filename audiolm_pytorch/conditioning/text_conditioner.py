"""Conditioning on texts by the hidden states of a published text encoder."""

from collections.abc import Sequence

import torch
from beartype import beartype

from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.conditioning.published_text import PublishedTextEncoder
from audiolm_pytorch.conditioning.tensors import ConditionTensor
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.modules import register

__all__ = ["TextConditioner"]


@register
class TextConditioner(PublishedTextEncoder, TextEncoder):
    """Frozen text encoder whose last hidden states are conditions, as T5 in MusicGen (arXiv:2306.05284, sec. 2.3).

    The hidden states of a text do not depend on other texts in the batch, and are float32 even under autocast.
    """

    @beartype
    @torch.no_grad()
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return hidden states `[b, t, dim]` float32 of texts, padded with zeros to the length of the longest text."""
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        mask = ids >= 0
        with torch.autocast(device.type, enabled=False):
            states = self.model(**self._text.inputs(ids)).last_hidden_state
        return ConditionTensor(states.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask)
