"""Condition tensors: embeddings that a language model is conditioned on."""

from dataclasses import dataclass

import torch
from beartype import beartype
from torch import Tensor

__all__ = ["ConditionTensor", "Conditions", "guide"]


@beartype
@dataclass(frozen=True)
class ConditionTensor:
    """Embeddings of one kind of condition.

    Attributes:
        embeddings: `[b, m, d]` with m >= 1; levels of codes from coarse to fine.
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
                f"{tuple(self.embeddings.shape)} and {tuple(self.mask.shape)} {self.mask.dtype}; an unconditional item "
                "has a mask that is all False"
            )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.embeddings)

    def without_items(self, drop: Tensor) -> "ConditionTensor":
        """Make the items marked in `drop [b]` (bool) unconditional."""
        return ConditionTensor(self.embeddings, self.mask & ~drop.to(self.mask.device).unsqueeze(1))

    def without_trailing(self, keep: Tensor) -> "ConditionTensor":
        """Keep the first `keep [b]` (int64) embeddings of every item."""
        levels = torch.arange(self.mask.shape[1], device=self.mask.device)
        return ConditionTensor(self.embeddings, self.mask & (levels < keep.to(self.mask.device).unsqueeze(1)))

    def select(self, items: Tensor) -> "ConditionTensor":
        """Select items by their indices `[k]` (int64)."""
        return ConditionTensor(
            self.embeddings[items.to(self.embeddings.device)],
            self.mask[items.to(self.mask.device)],
        )

    def expand(self, batch: int) -> "ConditionTensor":
        """Expand a single item to `batch` items; `batch` items are returned as they are."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"conditions of {len(self)} items for a batch of {batch}: pass 1 or {batch} items")
        return ConditionTensor(self.embeddings.expand(batch, -1, -1), self.mask.expand(batch, -1))


@beartype
@dataclass(frozen=True)
class Conditions:
    """All conditions of a model, at least one, each of 1 or b items.

    Attributes:
        codes: Embeddings of codes (MuLan codes of texts or audio) from the table of the model's namespace.
        text: States of a text encoder.
    """

    codes: ConditionTensor | None = None
    text: ConditionTensor | None = None

    def __post_init__(self) -> None:
        """Check the numbers of items."""
        sizes = {name: len(part) for name, part in self.parts.items()}
        if not sizes or len({size for size in sizes.values() if size != 1}) > 1:
            raise ValueError(f"pass codes, text or both, each of 1 item or of an equal number of items; got {sizes}")

    @property
    def parts(self) -> dict[str, ConditionTensor]:
        """The conditions that are present, by name."""
        named = {"codes": self.codes, "text": self.text}
        return {name: part for name, part in named.items() if part is not None}

    def __len__(self) -> int:
        """Number of items."""
        return max(len(part) for part in self.parts.values())

    def without_items(self, drop: Tensor) -> "Conditions":
        """Make the items marked in `drop [b]` (bool) unconditional."""
        parts = self.expand(len(drop)).parts
        return Conditions(**{name: part.without_items(drop) for name, part in parts.items()})

    def select(self, items: Tensor) -> "Conditions":
        """Select items by their indices `[k]` (int64)."""
        parts = self.expand(len(self)).parts
        return Conditions(**{name: part.select(items) for name, part in parts.items()})

    def expand(self, batch: int) -> "Conditions":
        """Expand single items to `batch` items."""
        return Conditions(**{name: part.expand(batch) for name, part in self.parts.items()})


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598, eq. 6, w = scale - 1) of logits.

    A scale of 0 returns the unconditional logits, 1 the conditional ones; larger scales follow the condition more.
    """
    return unconditional + scale * (conditional - unconditional)
