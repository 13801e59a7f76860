"""Projection of condition tensors, which are prepended or added to tokens, or used in cross-attention."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.nn.layers import RMSNorm
from audiolm_pytorch.nn.module_state import module_dict
from audiolm_pytorch.nn.transformer import INIT_STD, FusedConditions

__all__ = ["ConditionFuser", "ConditionSpec"]

# For error messages: the constructor arguments of a stage that add these conditions.
_ARGUMENTS = {"codes": "audio_text_condition=True or a cond_dim", "text": "a text_dim"}


@typed
@dataclass(frozen=True)
class ConditionSpec:
    """Settings of one condition of a language model.

    Attributes:
        dim: Width of the embeddings.
        way: `prepend` places the embeddings before the tokens, and `cross` uses cross-attention in every layer.
            `sum` adds one embedding to all tokens, or, with one embedding per frame, adds embedding i to the tokens
            that predict frame i.
        null: Embedding that replaces a missing condition, `learned`, `zero`, or `first`, which is the projection of the
            first class as a one-hot vector.
        null_tokens: Number of null embeddings that replace a missing condition; a null embedding also replaces each
            masked embedding. With `null_tokens=None`, one null embedding replaces a missing condition, and masked
            embeddings are ignored. With `all`, masked embeddings are ignored. A condition that guidance drops becomes
            as many null embeddings, and a condition that training drops becomes a random number of them.
        drop_prob: Probability that training drops only this condition; `cond_drop_prob` of the model drops all
            conditions.
        projection: `normed` is a linear layer without bias and a norm; `linear` is a linear layer with bias, as in
            MusicGen.
    """

    dim: int
    way: Literal["prepend", "cross", "sum"] = "prepend"
    null: Literal["learned", "zero", "first"] = "learned"
    null_tokens: int | Literal["all"] | None = None
    drop_prob: float = 0.0
    projection: Literal["normed", "linear"] = "normed"

    def to_dict(self) -> dict[str, Any]:
        """Convert the settings to data that JSON can store."""
        # Without default values, as in files from before these fields.
        return {key: value for key, value in asdict(self).items() if (key, value) != ("projection", "normed")}

    def __post_init__(self) -> None:
        is_number = isinstance(self.null_tokens, int)
        if self.dim < 1 or (is_number and int(self.null_tokens or 0) < 1) or not 0 <= self.drop_prob <= 1:
            raise ValueError(f"a condition needs dim >= 1, null_tokens >= 1 and 0 <= drop_prob <= 1, got {self}")


class _Condition(nn.Module):
    """Projection of one condition to the width of a transformer, with the null embedding for a missing condition."""

    null: Tensor
    zero: Tensor

    def __init__(self, spec: ConditionSpec, dim: int) -> None:
        super().__init__()
        self.spec = spec
        # The norm brings embeddings to the scale of token embeddings. Cross-attention does not normalise states.
        scale = 1.0 if spec.way == "cross" else INIT_STD
        self.projection = nn.Linear(spec.dim, dim, bias=spec.projection == "linear")
        self.norm: nn.Module = nn.Identity()
        if spec.projection == "normed":
            self.norm = RMSNorm(dim)
            nn.init.constant_(self.norm.weight, scale)
        if spec.null == "learned":
            self.null = nn.Parameter(torch.randn(dim) * scale)
        else:
            self.register_buffer("zero", torch.zeros(dim), persistent=False)

    def _null(self) -> Tensor:
        if self.spec.null == "first":
            return self.norm(self.projection(torch.eye(1, self.spec.dim).to(self.projection.weight)))[0]
        return self.zero if self.spec.null == "zero" else self.null

    def forward(self, condition: ConditionTensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Return m projected embeddings `[b, m, d]` and a mask `[b, m]`, which is False for embeddings to ignore."""
        weight = self.projection.weight
        if condition is None:
            num_rows = self.spec.null_tokens if isinstance(self.spec.null_tokens, int) else 1
            nothing = torch.zeros(batch, num_rows, self.spec.dim, device=weight.device)
            condition = ConditionTensor(nothing, torch.zeros(nothing.shape[:2], dtype=torch.bool))
        condition = condition.expand(batch)
        mask = condition.mask.to(weight.device)
        # NaN in padding would reach the gradients of the weights, because 0 * NaN is NaN.
        embeddings = condition.embeddings.to(weight).masked_fill(~mask.unsqueeze(-1), 0)
        null = self._null()
        embedded = torch.where(mask.unsqueeze(-1), self.norm(self.projection(embeddings)), null)
        if self.spec.way == "sum" and mask.shape[1] > 1:  # rows after the last embedding receive the null embedding
            embedded = torch.cat((embedded, null.expand(batch, 1, -1)), dim=1)
        if isinstance(self.spec.null_tokens, int):
            return embedded, torch.ones_like(mask)
        if self.spec.null_tokens == "all" and condition.rows is not None:
            mask = condition.rows.to(mask.device)
        is_first = torch.arange(mask.shape[1], device=mask.device) == 0
        return embedded, mask | (is_first & ~mask.any(dim=1, keepdim=True))


class ConditionFuser(nn.Module):
    """Module that projects the conditions of a language model to inputs of its transformer of width `dim`.

    If several conditions are prepended, the last condition in `specs` comes first.
    """

    def __init__(self, specs: dict[str, ConditionSpec], dim: int) -> None:
        super().__init__()
        self.specs = specs
        self.entries = module_dict({name: _Condition(spec, dim) for name, spec in specs.items()}, "conditions")

    def forward(self, conditions: Conditions, batch: int) -> FusedConditions:
        """Project conditions of 1 or `batch` items for the transformer; null embeddings replace missing conditions."""
        self.check(conditions)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {"prepend": [], "cross": [], "sum": []}
        for name, entry in self.entries.items():
            parts[self.specs[name].way].append(entry(conditions.get(name), batch))
        prefix, padding = _padded_in_front(*_concatenated(parts["prepend"][::-1])) if parts["prepend"] else (None, None)
        states, states_mask = _concatenated(parts["cross"]) if parts["cross"] else (None, None)
        row_sums = _summed([embeddings for embeddings, _ in parts["sum"]]) if parts["sum"] else None
        return FusedConditions(prefix, padding, states, states_mask, row_sums)

    def check(self, conditions: Conditions) -> None:
        """Check that the model accepts the names and widths of the conditions."""
        for name, condition in conditions.items():
            if name not in self.specs:
                arguments = _ARGUMENTS.get(name, f"conditions={{'{name}': ConditionSpec(...)}}")
                raise ValueError(f"the model does not accept {name} conditions; build the model with {arguments}")
            width, needed_width = condition.embeddings.shape[-1], self.specs[name].dim
            if width != needed_width:
                raise ValueError(f"the model needs {name} conditions of width {needed_width}, got width {width}")


def _concatenated(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    embeddings, masks = zip(*parts)
    return torch.cat(embeddings, dim=1), torch.cat(masks, dim=1)


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """Add embeddings `[b, m_i, d]` of conditions of lengths m_i; shorter conditions repeat their last embedding."""
    rows = torch.arange(max(part.shape[1] for part in parts), device=parts[0].device)
    return torch.stack([part[:, rows.clamp(max=part.shape[1] - 1)] for part in parts]).sum(dim=0)


def _padded_in_front(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move padding in m embeddings `[b, m, d]` to the front; also return its length per item, or None without padding.

    With padding in front, the distance from an embedding to the tokens does not depend on other items of the batch.
    """
    num_padding = (~mask).sum(dim=1)
    if not num_padding.any():
        return embeddings, None
    order = mask.int().argsort(dim=1, stable=True)
    return embeddings.gather(1, order.unsqueeze(-1).expand_as(embeddings)), num_padding
