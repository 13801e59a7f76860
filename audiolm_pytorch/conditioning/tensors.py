"""Condition tensors: embeddings that a language model is conditioned on."""

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


@beartype
@dataclass(frozen=True)
class Conditions:
    """All conditions of a language model. At least one is set; each has 1 or b items.

    Attributes:
        codes: Embeddings of MuLan codes of texts or audio, from the embedding table of the stage.
        text: Hidden states of a text encoder.
    """

    codes: ConditionTensor | None = None
    text: ConditionTensor | None = None

    def __post_init__(self) -> None:
        """Check the numbers of items."""
        sizes = {name: len(part) for name, part in self.parts.items()}
        if not sizes or len({size for size in sizes.values() if size != 1}) > 1:
            raise ValueError(
                f"got conditions with numbers of items {sizes}; pass codes, text or both, with 1 or equally many items"
            )

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
        """Repeat conditions of a single item `batch` times."""
        return Conditions(**{name: part.expand(batch) for name, part in self.parts.items()})


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv:2207.12598, eq. 6, w = scale - 1) to logits.

    A scale of 0 returns the unconditional logits and 1 the conditional logits. Larger scales follow the condition more
    closely.
    """
    return unconditional + scale * (conditional - unconditional)
