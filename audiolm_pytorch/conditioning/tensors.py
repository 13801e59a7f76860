"""Condition tensors: embeddings that a language model is conditioned on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from beartype import beartype
from torch import Tensor

__all__ = ["ConditionTensor", "Conditions", "guide"]


@beartype
@dataclass(frozen=True)
class ConditionTensor:
    """Condition of a batch: embeddings of codes or texts, with a padding mask.

    Attributes:
        embeddings: `[b, m, d]` with m >= 1. Embeddings of codes are ordered from the coarsest to the finest quantizer.
        mask: `[b, m]` bool, False for padding. If the mask of an item is False everywhere, the item is unconditional,
            and the model uses a null embedding.
    """

    embeddings: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        has_shapes = self.embeddings.ndim == 3 and self.mask.shape == self.embeddings.shape[:2]
        if not has_shapes or self.mask.dtype != torch.bool or self.mask.shape[1] == 0:
            raise ValueError(
                "a condition tensor needs embeddings [b, m, d] with m >= 1, and a bool mask [b, m]; got embeddings "
                f"{tuple(self.embeddings.shape)} and a {self.mask.dtype} mask {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.embeddings)

    @classmethod
    def of(cls, value: "Tensor | ConditionTensor") -> "ConditionTensor":
        """Build a condition tensor without padding from embeddings `[b, d]` (one per item) or `[b, m, d]`."""
        if isinstance(value, ConditionTensor):
            return value
        embeddings = value.unsqueeze(1) if value.ndim == 2 else value
        return cls(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=value.device))

    def without_items(self, drop: Tensor) -> "ConditionTensor":
        """Return a copy in which the items where `drop [b]` (bool) is True are unconditional."""
        return ConditionTensor(self.embeddings, self.mask & ~drop.to(self.mask.device).unsqueeze(1))

    def without_trailing(self, keep: Tensor) -> "ConditionTensor":
        """Mask all embeddings of item i after the first `keep[i]` embeddings; `keep` is `[b]` int64."""
        levels = torch.arange(self.mask.shape[1], device=self.mask.device)
        return ConditionTensor(self.embeddings, self.mask & (levels < keep.to(self.mask.device).unsqueeze(1)))

    def select(self, items: Tensor) -> "ConditionTensor":
        """Return a condition tensor of the items with the indices `items [k]` (int64)."""
        return ConditionTensor(
            self.embeddings[items.to(self.embeddings.device)],
            self.mask[items.to(self.mask.device)],
        )

    def expand(self, batch: int) -> "ConditionTensor":
        """Repeat a condition of one item `batch` times; a condition of `batch` items is returned unchanged."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"got conditions for {len(self)} items, need conditions for 1 or {batch} items")
        return ConditionTensor(self.embeddings.expand(batch, -1, -1), self.mask.expand(batch, -1))


# Conditions of a model by name, each of 1 or b items.
Conditions = Mapping[str, ConditionTensor]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv:2207.12598, eq. 6, w = scale - 1) to logits.

    Scale 0 returns the unconditional logits, and scale 1 returns the conditional logits. With a larger guidance scale,
    samples follow the condition more closely.
    """
    return unconditional + scale * (conditional - unconditional)
