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
    """Embeddings of codes or text states, with a mask.

    Attributes:
        embeddings: `[b, m, d]` with m >= 1. For codes, the m embeddings are ordered from the coarsest level to the
            finest.
        mask: `[b, m]` bool, False for padding. An item whose mask is all False is unconditional: the model replaces its
            embeddings by a learned null embedding.
    """

    embeddings: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        """Check shapes and types."""
        has_shapes = self.embeddings.ndim == 3 and self.mask.shape == self.embeddings.shape[:2]
        if not has_shapes or self.mask.dtype != torch.bool or self.mask.shape[1] == 0:
            raise ValueError(
                "a condition tensor needs embeddings [b, m, d] with m >= 1 and a bool mask [b, m], got "
                f"{tuple(self.embeddings.shape)} and {tuple(self.mask.shape)} {self.mask.dtype}; for an unconditional "
                "item pass a mask that is all False"
            )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.embeddings)

    @classmethod
    def of(cls, value: "Tensor | ConditionTensor") -> "ConditionTensor":
        """Build a condition without padding from embeddings `[b, d]` (one per item) or `[b, m, d]`."""
        if isinstance(value, ConditionTensor):
            return value
        embeddings = value.unsqueeze(1) if value.ndim == 2 else value
        return cls(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=value.device))

    def without_items(self, drop: Tensor) -> "ConditionTensor":
        """Make the items marked in `drop [b]` (bool) unconditional."""
        return ConditionTensor(self.embeddings, self.mask & ~drop.to(self.mask.device).unsqueeze(1))

    def without_trailing(self, keep: Tensor) -> "ConditionTensor":
        """Mask all embeddings of item i after its first `keep[i]` embeddings (`keep [b]`, int64)."""
        levels = torch.arange(self.mask.shape[1], device=self.mask.device)
        return ConditionTensor(self.embeddings, self.mask & (levels < keep.to(self.mask.device).unsqueeze(1)))

    def select(self, items: Tensor) -> "ConditionTensor":
        """Select items by their indices `[k]` (int64)."""
        return ConditionTensor(
            self.embeddings[items.to(self.embeddings.device)],
            self.mask[items.to(self.mask.device)],
        )

    def expand(self, batch: int) -> "ConditionTensor":
        """Repeat a single item `batch` times; a tensor of `batch` items is returned unchanged."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"got conditions of {len(self)} items, the batch has {batch}; pass 1 or {batch} items")
        return ConditionTensor(self.embeddings.expand(batch, -1, -1), self.mask.expand(batch, -1))


# Conditions of a model by name, each of 1 or b items.
Conditions = Mapping[str, ConditionTensor]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv:2207.12598, eq. 6, w = scale - 1) to logits.

    A scale of 0 returns the unconditional logits and 1 the conditional logits. Larger scales follow the condition more
    closely.
    """
    return unconditional + scale * (conditional - unconditional)
