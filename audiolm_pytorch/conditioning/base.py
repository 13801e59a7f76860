"""Condition tensors, and the base classes of modules that compute condition tensors from texts, waves or codes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.checks.types import described, typed
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["ConditionTensor", "Conditioner", "Conditions", "TextEncoder", "guide"]


@typed
@dataclass(frozen=True)
class ConditionTensor:
    """Condition of a batch: embeddings of codes or texts, with a padding mask.

    Attributes:
        embeddings: `[b, m, d]`, m >= 1 per item. Embeddings of codes are ordered from coarse to fine quantizers.
        mask: `[b, m]` bool, False for padding. If the mask of an item is False everywhere, the item is unconditional,
            and the model uses a null embedding.
        rows: `[b, m]` bool, the mask before `without_items` made items unconditional; None = `mask`.
    """

    embeddings: Tensor
    mask: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.embeddings.is_floating_point():
            raise ValueError(f"embeddings must be floats, got {described(self.embeddings)}")
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
        """Build a condition tensor without padding from one or m embeddings per item, `[b, d]` or `[b, m, d]`."""
        if isinstance(value, ConditionTensor):
            return value
        embeddings = value.unsqueeze(1) if value.ndim == 2 else value
        return cls(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=value.device))

    @classmethod
    def padded(cls, items: Sequence[Tensor]) -> "ConditionTensor":
        """Pad the embeddings `[m_i, d]` of all items to one batch; m_i may be 0."""
        lengths = torch.tensor([len(item) for item in items], device=items[0].device)
        embeddings = pad_sequence([item if len(item) else item.new_zeros(1, item.shape[1]) for item in items], True)
        return cls(embeddings, torch.arange(embeddings.shape[1], device=lengths.device) < lengths.unsqueeze(1))

    def without_items(self, drop: Tensor, num_rows: Tensor | None = None) -> "ConditionTensor":
        """Return a copy in which the items where `drop [b]` (bool) is True are unconditional.

        `num_rows [b]` are the lengths of the `rows` of these items; None = their number of embeddings.
        """
        rows = self.mask if self.rows is None else self.rows
        if num_rows is not None:
            places = torch.arange(rows.shape[1], device=rows.device)
            drawn = places < num_rows.to(rows.device).unsqueeze(1)
            rows = torch.where(drop.to(rows.device).unsqueeze(1), drawn, rows)
        return ConditionTensor(self.embeddings, self.mask & ~drop.to(self.mask.device).unsqueeze(1), rows)

    def without_trailing(self, keep: Tensor) -> "ConditionTensor":
        """Mask all embeddings of item i after the first `keep[i]` embeddings; `keep` is `[b]` int64."""
        levels = torch.arange(self.mask.shape[1], device=self.mask.device)
        return ConditionTensor(self.embeddings, self.mask & (levels < keep.to(self.mask.device).unsqueeze(1)))

    def select(self, items: Tensor) -> "ConditionTensor":
        """Return a condition tensor of the items with the indices `items [k]` (int64)."""
        items = items.to(self.mask.device)
        rows = None if self.rows is None else self.rows[items]
        return ConditionTensor(self.embeddings[items.to(self.embeddings.device)], self.mask[items], rows)

    @classmethod
    def concatenate(cls, conditions: "Sequence[ConditionTensor]") -> "ConditionTensor":
        """Concatenate the items of several conditions; conditions with fewer embeddings are padded."""
        if len(conditions) == 1:
            return conditions[0]
        longest = max(condition.mask.shape[1] for condition in conditions)
        missing = [longest - condition.mask.shape[1] for condition in conditions]
        embeddings = [F.pad(part.embeddings, (0, 0, 0, count)) for part, count in zip(conditions, missing)]
        masks = [F.pad(part.mask, (0, count)) for part, count in zip(conditions, missing)]
        if all(part.rows is None for part in conditions):
            return cls(torch.cat(embeddings), torch.cat(masks))
        rows = [part.mask if part.rows is None else part.rows for part in conditions]
        padded = [F.pad(row, (0, count)) for row, count in zip(rows, missing)]
        return cls(torch.cat(embeddings), torch.cat(masks), torch.cat(padded))

    def expand(self, batch: int) -> "ConditionTensor":
        """Repeat a condition of one item `batch` times; a condition of `batch` items is returned unchanged."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"got conditions for {len(self)} items, need conditions for 1 or {batch} items")
        rows = None if self.rows is None else self.rows.expand(batch, -1)
        return ConditionTensor(self.embeddings.expand(batch, -1, -1), self.mask.expand(batch, -1), rows)


# Conditions of a model by name, each of 1 or b items.
Conditions = Mapping[str, ConditionTensor]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv:2207.12598, eq. 6, w = scale - 1) to logits.

    Scale 0 returns the unconditional logits, and scale 1 returns the conditional logits.
    """
    return unconditional + scale * (conditional - unconditional)


class Conditioner(SavedModule, ABC):
    """Base class of conditioners, which turn texts or waves into integer codes and embed the codes for language models.

    A conditioner has one embedding table per language model stage; `namespace` is the name of the stage.
    """

    @property
    @abstractmethod
    def sample_hz(self) -> int:
        """Sample rate in Hz of the waves that the conditioner accepts."""

    def fingerprint(self) -> str | None:
        """Return a hash of the weights and settings that determine the codes, or None if no hash is available."""
        return None

    @abstractmethod
    def codes(
        self, *, texts: str | Sequence[str] | None = None, wavs: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Return codes `[b, q]` of texts or waves `[b, n]`; `lengths [b]` are unpadded wave lengths in samples."""

    @abstractmethod
    def codes_from_latents(self, latents: Tensor, modality: Literal["audio", "text"] = "audio") -> Tensor:
        """Quantize precomputed embeddings `[b, d]` of audio or texts to codes `[b, q]`."""

    @abstractmethod
    def conditioning(
        self,
        *,
        texts: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> ConditionTensor:
        """Return the condition tensor of `texts`, `wavs [b, n]` or `codes [b, q]`, of which only one may be passed.

        Only the embedding table that `namespace` selects receives gradients.
        """

    @abstractmethod
    def table(self, namespace: str) -> nn.Module:
        """Return the embedding table of a namespace, which is trained and saved with its language model stage."""

    @abstractmethod
    def dim(self, namespace: str) -> int:
        """Return the width of the embeddings in the table of a namespace."""


class TextEncoder(SavedModule, ABC):
    """Base class of text encoders, which return one hidden state per text token as a condition tensor.

    A trainer also trains those parameters of an encoder that require gradients.
    """

    dim: int  # width of the hidden states

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the weights and settings that determine the hidden states."""

    @abstractmethod
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return hidden states `[b, t, dim]` float32 of one or several texts."""

    def states_of(self, texts: Sequence[str | None], device: torch.device) -> ConditionTensor | None:
        """Return the hidden states of items on a device; items whose text is None are unconditional.

        Returns None if no item has a text.
        """
        present = [(item, text) for item, text in enumerate(texts) if text is not None]
        if not present:
            return None
        self.to(device)
        states = self.forward([text for _, text in present])
        items = torch.tensor([item for item, _ in present], device=device)
        embeddings = states.embeddings.new_zeros(len(texts), *states.embeddings.shape[1:]).to(device)
        mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=device)
        embeddings[items], mask[items] = states.embeddings.to(device), states.mask.to(device)
        return ConditionTensor(embeddings, mask)
