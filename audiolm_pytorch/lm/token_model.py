"""The token language model that is the base of every stage."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.units import check_durations
from audiolm_pytorch.checks.names import unknown_arguments
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.conditioning.fuser import ConditionFuser, ConditionSpec
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.nn.transformer import INIT_STD, FusedConditions, Transformer
from audiolm_pytorch.saving.modules import SavedModule, register
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import PackedTokens

__all__ = ["TokenLoss", "TokenTransformer"]

# Arguments that stages set themselves, and names of `**` arguments.
_NOT_FOR_CALLERS = {"layout", "sources", "config", "streams", "cross", "causal", "stack", "options"}


@dataclass(frozen=True)
class TokenLoss:
    """Loss and accuracy of predicted tokens.

    Attributes:
        loss: `[]`, mean cross-entropy of all predicted tokens, in nats.
        per_stream: Mean cross-entropy by name of each predicted stream; for streams of several levels also by
            `name.level`, for each level. The loss of uniform predictions is the logarithm of the vocabulary size.
        accuracy: `[]`, share of predicted tokens for which the true token has the highest logit.
    """

    loss: Tensor
    per_stream: dict[str, Tensor]
    accuracy: Tensor


@register
class TokenTransformer(SavedModule):
    """Decoder-only language model over the rows of a token layout.

    The embedding of a row is the sum of its token embeddings. Every level of every predicted stream has its own
    linear head. A `ConditionFuser` adds the conditions: `codes` (prepended), `text` and those in `conditions`. Null
    embeddings replace missing conditions.

    Args:
        ff_mult: Inner width of the gated feed-forward, as a multiple of `dim`.
        cond_dim: Width of the embeddings of conditioning codes; None = the model is not conditioned on codes.
        cond_drop_prob: Probability that training drops all conditions of an item, for classifier-free guidance.
        null_tokens: Number of null embeddings that replace missing conditioning codes; normally as many as the codes.
        max_seconds: Longest duration that the model was trained on; longer audio is generated in sliding windows.
            None = no limit.
        text_dim: Width of the text states; None = the model is not conditioned on text states.
        text_as: How text states enter the model: `cross` (cross-attention in every block) or `prefix` (prepended before
            the codes).
        conditions: Further conditions by name, as `ConditionSpec` or as a dict of its fields. The name `text` replaces
            `text_dim` and `text_as`.
        **stack: Further arguments of `Transformer`: positions, kv_heads, checkpoint_blocks, forget_prob.
    """

    @typed
    def __init__(
        self,
        *,
        layout: TokenLayout,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: float = 4.0,
        dropout: float = 0.0,
        cond_dim: int | None = None,
        cond_drop_prob: float = 0.1,
        null_tokens: int = 8,
        max_seconds: float | None = None,
        text_dim: int | None = None,
        text_as: Literal["cross", "prefix"] = "cross",
        conditions: Mapping[str, ConditionSpec | Mapping[str, Any]] | None = None,
        **stack: Any,
    ) -> None:
        super().__init__()
        if unknown := [name for name in stack if name not in inspect.signature(Transformer).parameters]:
            classes = [one for one in type(self).__mro__ if issubclass(one, TokenTransformer)]
            names = {argument for one in (*classes, Transformer) for argument in inspect.signature(one).parameters}
            raise unknown_arguments(type(self).__name__, unknown, sorted(names - _NOT_FOR_CALLERS))
        if not 0 <= cond_drop_prob <= 1 or null_tokens < 1:
            raise ValueError(f"need 0 <= cond_drop_prob <= 1 and null_tokens >= 1, got {cond_drop_prob}, {null_tokens}")
        check_positive(cond_dim=cond_dim, text_dim=text_dim)
        check_durations(max_seconds=max_seconds)
        self.layout = layout
        self.cond_dim, self.cond_drop_prob, self.null_tokens = cond_dim, cond_drop_prob, null_tokens
        self.text_dim, self.text_as = text_dim, text_as
        self.max_seconds = max_seconds
        sizes: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "dim_head": dim_head, "ff_mult": ff_mult}
        self._config: dict[str, Any] = {
            **{**sizes, "dropout": dropout, **stack},
            **{"cond_dim": cond_dim, "cond_drop_prob": cond_drop_prob, "null_tokens": null_tokens},
            **({} if text_dim is None else {"text_dim": text_dim, "text_as": text_as}),
        }
        specs: dict[str, ConditionSpec] = {}
        if cond_dim is not None:
            specs["codes"] = ConditionSpec(cond_dim, null_tokens=null_tokens)
        if text_dim is not None:
            specs["text"] = ConditionSpec(text_dim, "cross" if text_as == "cross" else "prepend")
        further = {
            name: spec if isinstance(spec, ConditionSpec) else ConditionSpec(**spec)
            for name, spec in (conditions or {}).items()
        }
        if further:
            self._config["conditions"] = {name: spec.to_dict() for name, spec in further.items()}
        if "codes" in further or ("text" in further and further["text"].dim != text_dim):
            raise ValueError(
                "codes and text are set by cond_dim and text_dim; choose other names for `conditions`, or set text_dim "
                "to the width of the condition text"
            )
        specs |= further
        cross = any(spec.way == "cross" for spec in specs.values())
        self.transformer = Transformer(**sizes, dropout=dropout, cross=cross, **stack)
        # The last embedding is used for empty cells of the layout. It is zero and has no gradient.
        self.embedding = nn.Embedding(layout.num_ids + 1, dim, padding_idx=layout.num_ids)
        self.heads = nn.ModuleList(nn.Linear(dim, head.num_logits, bias=False) for head in layout.heads)
        # Sinusoidal positions have an amplitude of 1. If embeddings are far smaller, the tokens have no influence at
        # first, and the loss stays at that of the frequencies of the tokens for hundreds of steps.
        embedding_std = 1.0 if stack.get("positions") == "sinusoidal" else INIT_STD
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=INIT_STD)
        nn.init.zeros_(self.embedding.weight[layout.num_ids])
        self.fuser = ConditionFuser(specs, dim)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, in a form that JSON can store."""
        return {"layout": self.layout.to_dict(), **self._config, "max_seconds": self.max_seconds}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TokenTransformer":
        """Build a model from `config`, with newly initialised weights."""
        return cls(**{**config, "layout": TokenLayout.from_dict(config["layout"])})

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.weight.device

    @typed
    def forward(
        self, packed: PackedTokens, conditioning: Conditions | None = None, input_ids: Tensor | None = None
    ) -> TokenLoss:
        """Compute the loss of the tokens that `packed.loss_mask` marks, each predicted from the rows before it.

        Args:
            conditioning: Conditions by name, of 1 or b items. In training, the conditions of random items are dropped.
            input_ids: Ids `[b, rows, columns]` that the model reads instead of `packed.ids`, for example with noise;
                the targets are always `packed.ids`.
        """
        self.layout.check_packed(packed)
        batch, targets = len(packed.ids), packed.ids
        packed = packed if input_ids is None else replace(packed, ids=input_ids)
        conditions = dict(conditioning or {})
        if self.training and self.cond_drop_prob > 0 and (conditions or self.layout.has_conditions):
            dropped = torch.rand(batch) < self.cond_drop_prob
            packed = self.layout.without_conditions(packed, dropped)
            conditions = {name: self._without(name, part.expand(batch), dropped) for name, part in conditions.items()}
        for name, spec in self.fuser.specs.items():
            if self.training and spec.drop_prob > 0 and name in conditions:
                dropped = torch.rand(batch) < spec.drop_prob
                conditions[name] = self._without(name, conditions[name].expand(batch), dropped)
        hidden = self.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1], self.fuse(conditions, batch))
        return self._loss(hidden, targets[:, 1:], packed.loss_mask[:, 1:])

    def _without(self, name: str, condition: ConditionTensor, drop: Tensor) -> ConditionTensor:
        """Drop a condition of items in training.

        The number of null embeddings is random, so that the model does not recognise the condition by its length. Half
        of the items have one null embedding, like an item that never had the condition.
        """
        if self.fuser.specs[name].null_tokens != "all":
            return condition.without_items(drop)
        num_rows = torch.randint(1, 1 + condition.mask.shape[1], (len(drop),))
        return condition.without_items(drop, num_rows.where(torch.rand(len(drop)) < 0.5, 1))

    def _loss(self, hidden: Tensor, targets: Tensor, loss_mask: Tensor) -> TokenLoss:
        """Compute the loss of predicting the ids `targets [b, rows, columns]` from final states `[b, rows, d]`.

        Logits are computed only where the loss mask is True.
        """
        sums: dict[str, Tensor] = {}  # by name: nats, hits, tokens
        for index, head in enumerate(self.layout.heads):
            is_own = loss_mask & (targets >= head.first_id) & (targets < head.first_id + head.num_logits)
            item, row, _ = is_own.nonzero(as_tuple=True)
            logits = self.logits(hidden[item, row], index)
            local = targets[is_own] - head.first_id
            nats = F.cross_entropy(logits, local, reduction="sum")
            hits = (logits.detach().argmax(dim=-1) == local).sum()
            score = torch.stack((nats, hits.to(nats.dtype), nats.new_tensor(float(len(local)))))
            has_levels = sum(other.stream == head.stream for other in self.layout.heads) > 1
            for name in (head.stream, f"{head.stream}.{head.level}") if has_levels else (head.stream,):
                sums[name] = sums[name] + score if name in sums else score
        nats, hits, count = torch.stack([sums[stream.name] for stream in self.layout.predicted]).sum(dim=0)
        return TokenLoss(
            loss=nats / count.clamp(min=1),
            per_stream={name: score[0] / score[2].clamp(min=1) for name, score in sums.items()},
            accuracy=hits.detach() / count.clamp(min=1),
        )

    def fuse(self, conditions: Conditions | None, batch: int) -> FusedConditions:
        """Project conditions of 1 or `batch` items for the transformer; null embeddings replace missing conditions."""
        fused: FusedConditions = self.fuser(conditions or {}, batch)
        if fused.row_sums is not None and fused.row_sums.shape[1] > 1 and not self.layout.has_row_per_frame:
            raise ValueError(
                "a condition with one embedding per frame needs a layout with one row per frame; use the delayed or "
                "parallel pattern and only streams with a rate, or pass one embedding per item"
            )
        return fused

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the sum `[b, n, d]` of the token embeddings of every row; see `hidden`."""
        cells = rearrange(ids.masked_fill(~mask, self.layout.num_ids), "b n c -> (b n) c")
        x = F.embedding_bag(cells, self.embedding.weight, mode="sum", padding_idx=self.layout.num_ids)
        return rearrange(x, "(b n) d -> b n d", b=len(ids))

    def hidden(self, ids: Tensor, mask: Tensor, conditions: FusedConditions | None = None) -> Tensor:
        """Return the final state `[b, n, d]` of every row, from which the next row is predicted.

        Args:
            ids: Token ids `[b, n, columns]`.
            mask: `[b, n, columns]` bool, False where a row has no token in a column.
        """
        hidden: Tensor = self.transformer(self.embed(ids, mask), conditions)
        return hidden

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """Return the logits `[..., num_logits]` float32 of one head for final states `[..., d]`."""
        return self.heads[head](hidden).float()
