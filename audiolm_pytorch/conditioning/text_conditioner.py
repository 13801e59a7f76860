"""Texts as conditions: the states of a published text encoder, one per token."""

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
    """The last hidden states of a published text encoder, as MusicGen uses those of T5 (arXiv:2306.05284, sec. 2.3).

    The encoder is frozen. A text has the same states in any batch, in float32 also under autocast.
    """

    @beartype
    @torch.no_grad()
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return the states `[b, t, dim]` float32 of texts, t = tokens of the longest text; 0 past the end."""
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        mask = ids >= 0
        with torch.autocast(device.type, enabled=False):
            states = self.model(**self._text.inputs(ids)).last_hidden_state
        return ConditionTensor(states.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask)
