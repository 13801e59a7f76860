"""Text encoder of a MusicGen from the text tower of a MuLaN, or from a small tower that is trained with the model."""

from collections.abc import Sequence
from typing import Any

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import ConditionTensor, TextEncoder
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import build_module, module_spec, register
from musiclm_pytorch.mulan.text_tower import TextTransformer

__all__ = ["TextTowerEncoder"]


@register
class TextTowerEncoder(TextEncoder):
    """Text encoder that returns the last hidden states of all tokens of a text tower.

    Args:
        tower: Text tower, trained or untrained.
        frozen: Whether training of the language model leaves the tower unchanged.
    """

    @typed
    def __init__(self, tower: TextTransformer, *, frozen: bool = False) -> None:
        super().__init__()
        self.tower, self.frozen, self.dim = tower, frozen, tower.dim
        tower.requires_grad_(not frozen)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, in a form that JSON can store."""
        return {"tower": module_spec(self.tower), "frozen": self.frozen}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextTowerEncoder":
        """Build an encoder from its `config`, with newly initialised weights."""
        tower: Any = build_module(config["tower"])
        return cls(tower, frozen=config["frozen"])

    def fingerprint(self) -> str:
        """Return a hash of the weights, the tokenizer and the settings of the tower."""
        return fingerprint_of(self.tower)

    @typed
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return hidden states, padded with zeros to the length of the longest text."""
        tower = self.tower
        ids = tower.tokenize(texts).to(tower.embedding.weight.device)
        mask = ids >= 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = tower.encoder(tower.embedding(ids.clamp(min=0)), mask=None if bool(mask.all()) else mask)
        return ConditionTensor(states.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask)
