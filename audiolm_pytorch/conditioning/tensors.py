"""Conditions of a language model: embeddings of what is wanted, where they come from, how they guide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from beartype import beartype
from torch import Tensor, nn

__all__ = ["Conditioner", "ConditionTensor", "Conditions", "TextEncoder", "guide"]


@beartype
@dataclass(frozen=True)
class ConditionTensor:
    """Embeddings that describe what is wanted.

    Attributes:
        embeddings: `[b, m, d]`, m >= 1, coarse levels first.
        mask: `[b, m]` bool, True where an embedding stands. An item whose mask is all False is unconditional: a model
            hears its learned null embedding instead.

    Raises:
        ValueError: If shapes do not belong together, or the mask is not bool.
    """

    embeddings: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        """Refuse what does not belong together, and what leaves no place for a null embedding."""
        fits = self.embeddings.ndim == 3 and self.mask.shape == self.embeddings.shape[:2]
        if not fits or self.mask.dtype != torch.bool or self.mask.shape[1] == 0:
            raise ValueError(
                "a conditioning needs embeddings [b, m, d] with m >= 1 and a mask [b, m] bool, got "
                f"{tuple(self.embeddings.shape)} and {tuple(self.mask.shape)} {self.mask.dtype}; an item without any "
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
        """Keep the items numbered in `items [k]` (int64)."""
        return ConditionTensor(
            self.embeddings[items.to(self.embeddings.device)],
            self.mask[items.to(self.mask.device)],
        )

    def expand(self, batch: int) -> "ConditionTensor":
        """Give the only item to a whole batch; a conditioning of the right size is returned as it is.

        Raises:
            ValueError: If there are several items, but not `batch` of them.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"a conditioning of {len(self)} items does not fit a batch of {batch}: give 1 or {batch}")
        return ConditionTensor(self.embeddings.expand(batch, -1, -1), self.mask.expand(batch, -1))


@beartype
@dataclass(frozen=True)
class Conditions:
    """Everything that a model is conditioned on, of the same items.

    Attributes:
        codes: Embeddings of codes (MuLaN's, of text or audio), in the namespace of the model.
        text: States of a text encoder.

    Raises:
        ValueError: If there is no part, or parts are of different items.
    """

    codes: ConditionTensor | None = None
    text: ConditionTensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts that speak of different items."""
        sizes = {name: len(part) for name, part in self.parts.items()}
        if not sizes or len({size for size in sizes.values() if size != 1}) > 1:
            raise ValueError(f"conditions need parts, each of 1 item or of as many items as the others, got {sizes}")

    @property
    def parts(self) -> dict[str, ConditionTensor]:
        """The parts that are there, by name."""
        named = {"codes": self.codes, "text": self.text}
        return {name: part for name, part in named.items() if part is not None}

    def __len__(self) -> int:
        """Number of items."""
        return max(len(part) for part in self.parts.values())

    def without_items(self, drop: Tensor) -> "Conditions":
        """Make the items marked in `drop [b]` (bool) unconditional, in all parts."""
        whole = self.expand(len(drop))
        return Conditions(**{name: part.without_items(drop) for name, part in whole.parts.items()})

    def select(self, items: Tensor) -> "Conditions":
        """Keep the items numbered in `items [k]` (int64)."""
        whole = self.expand(len(self))
        return Conditions(**{name: part.select(items) for name, part in whole.parts.items()})

    def expand(self, batch: int) -> "Conditions":
        """Give the only item to a whole batch; parts of the right size stay as they are.

        Raises:
            ValueError: If a part has several items, but not `batch` of them.
        """
        return Conditions(**{name: part.expand(batch) for name, part in self.parts.items()})


@runtime_checkable
class Conditioner(Protocol):
    """Turns texts, waves or codes into conditionings; every stage asks in its own namespace."""

    @property
    def sample_hz(self) -> int:
        """Rate of the waves it reads (Hz)."""
        ...

    def conditioning(
        self,
        *,
        texts: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> ConditionTensor:
        """Embed exactly one of texts, waves `[b, n]` (with true lengths `[b]`) and codes `[b, q]`.

        Gradients flow into the table of the namespace and nowhere else.
        """
        ...

    def codes(
        self, *, texts: str | Sequence[str] | None = None, wavs: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Codes `[b, q]` of exactly one of texts and waves `[b, n]` (with true lengths `[b]`)."""
        ...

    def codes_from_latents(self, latents: Tensor, modality: Literal["audio", "text"] = "audio") -> Tensor:
        """Codes `[b, q]` of latents `[b, d]`, of audio or of texts, that were computed before."""
        ...

    def table(self, namespace: str) -> nn.Module:
        """Give the trainable part of a namespace, which is trained and checkpointed with its stage."""
        ...

    def dim(self, namespace: str) -> int:
        """Width of the embeddings of a namespace."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Turns texts into conditionings, a state for every token of a text (see `TextConditioner`)."""

    @property
    def dim(self) -> int:
        """Width of the states."""
        ...

    def fingerprint(self) -> str:
        """Hash of all that the states depend on."""
        ...

    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """States `[b, t, dim]` float32 of one text or several, and the mask `[b, t]` of real ones; no gradients."""
        ...


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Move logits away from the unconditional ones (classifier-free guidance, arXiv:2207.12598, eq. 6, w = scale - 1).

    Args:
        conditional: Logits with the condition, any shape.
        unconditional: Logits without it, same shape.
        scale: 0 = unconditional, 1 = conditional, more = further that way.

    Returns:
        `unconditional + scale * (conditional - unconditional)`.
    """
    return unconditional + scale * (conditional - unconditional)
