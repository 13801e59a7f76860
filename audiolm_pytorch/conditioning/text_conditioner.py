"""Conditioning on texts through the states of a published text encoder."""

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
    """Computes the last hidden states of a published text encoder, like MusicGen with T5 (arXiv:2306.05284, sec. 2.3).

    The encoder is frozen. The states of a text do not depend on the rest of the batch. They are float32, also under
    autocast.
    """

    @beartype
    @torch.no_grad()
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return states `[b, t, dim]` float32 of texts; t is the length of the longest text, and padding is 0."""
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        mask = ids >= 0
        with torch.autocast(device.type, enabled=False):
            states = self.model(**self._text.inputs(ids)).last_hidden_state
        return ConditionTensor(states.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask)
