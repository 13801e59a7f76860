"""One language model over any token layout; the semantic, coarse and fine stages are declarations of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange, repeat
from torch import Tensor, nn

from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.nn.kv_cache import CachePositions, KVCache
from audiolm_pytorch.nn.layers import Projection, RMSNorm
from audiolm_pytorch.nn.transformer import INIT_STD, ConditionTensors, Transformer
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Head, PackedTokens

__all__ = ["TokenLoss", "TokenTransformer"]


@dataclass(frozen=True)
class TokenLoss:
    """How well tokens were predicted.

    Attributes:
        loss: `[]`, mean cross-entropy of all predicted tokens, in nats.
        per_stream: The same for each predicted stream by name, and, where a stream has several levels, for each level
            as `name.level`. Chance is the logarithm of the vocabulary size.
        accuracy: `[]`, share of tokens that were thought likeliest.
    """

    loss: Tensor
    per_stream: dict[str, Tensor]
    accuracy: Tensor


@register
class TokenTransformer(nn.Module):
    """Decoder-only language model over the grid of a layout.

    A row is embedded as the sum of its tokens; every (predicted stream, level) has a linear head of its own. Codes
    stand before the sequence as embeddings; states of a text encoder stand there too, or are attended to from every
    block. Where a condition is missing, a learned null embedding stands.

    Args:
        layout: What is read and written.
        dim: Width d.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dim_head: Width of a head.
        ff_mult: Width inside the gated feed-forward, in multiples of `dim`.
        dropout: Dropout probability.
        cond_dim: Width of the embeddings of codes; None = the model takes none.
        cond_drop_prob: Probability that training drops an item's conditions, all of them together: what guidance guides
            away from.
        null_tokens: Null embeddings that stand for codes where none are given at all.
        max_seconds: Longest stretch it was trained on; more is generated in windows. None = no limit.
        text_dim: Width of the states of a text encoder; None = the model takes none.
        text_as: How states of a text enter: `cross` (cross-attention in every block) or `prefix` (before the codes).
        **stack: Further arguments of `Transformer`: positions, kv_heads, checkpoint_blocks, forget_prob.

    Raises:
        ValueError: If a number is out of range.
    """

    @beartype
    def __init__(
        self,
        *,
        layout: TokenLayout,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: float | int = 4.0,
        dropout: float | int = 0.0,
        cond_dim: int | None = None,
        cond_drop_prob: float | int = 0.1,
        null_tokens: int = 8,
        max_seconds: float | int | None = None,
        text_dim: int | None = None,
        text_as: Literal["cross", "prefix"] = "cross",
        **stack: Any,
    ) -> None:
        super().__init__()
        if not 0 <= cond_drop_prob <= 1 or null_tokens < 1:
            raise ValueError(f"need 0 <= cond_drop_prob <= 1 and null_tokens >= 1, got {cond_drop_prob}, {null_tokens}")
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
        cross = text_dim is not None and text_as == "cross"
        self.transformer = Transformer(**sizes, dropout=dropout, cross=cross, **stack)
        # The last embedding stands in empty cells; it is zero and stays so.
        self.embedding = nn.Embedding(layout.num_ids + 1, dim, padding_idx=layout.num_ids)
        self.heads = nn.ModuleList(Projection(dim, head.num_logits) for head in layout.heads)
        for weight in (self.embedding.weight, *self.heads.parameters()):
            nn.init.normal_(weight, std=INIT_STD)
        nn.init.zeros_(self.embedding.weight[layout.num_ids])
        # Conditions enter at the size of token embeddings, whatever the scale of the table they come from.
        if cond_dim is not None:
            self.cond_projection = nn.Linear(cond_dim, dim, bias=False)
            self.cond_norm = RMSNorm(dim)
            self.null_embedding = nn.Parameter(torch.randn(dim) * INIT_STD)
            nn.init.constant_(self.cond_norm.weight, INIT_STD)
        if text_dim is not None:
            self.text_projection = nn.Linear(text_dim, dim, bias=False)
            self.text_norm = RMSNorm(dim)
            size = 1.0 if cross else INIT_STD  # keys and values are made of states as of normalised rows
            self.null_text = nn.Parameter(torch.randn(dim) * size)
            nn.init.constant_(self.text_norm.weight, size)

    # saving

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON-able data."""
        return {"layout": self.layout.to_dict(), **self._config, "max_seconds": self.max_seconds}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TokenTransformer":
        """Build the model that `config` describes, with fresh weights."""
        return cls(**{**config, "layout": TokenLayout.from_dict(config["layout"])})

    # training

    @beartype
    def forward(self, packed: PackedTokens, conditioning: Conditions | None = None) -> TokenLoss:
        """Predict every token of the loss mask from what stands in the rows before it.

        Args:
            packed: Tokens, as packed by `layout`.
            conditioning: Condition of 1 or b items. In training it is dropped item by item.

        Returns:
            The loss, in float32.

        Raises:
            ValueError: If a conditioning is given to a model that takes none, or fits neither width nor batch.
        """
        batch = len(packed.ids)
        is_conditioned = conditioning is not None or self.layout.null_id is not None
        if is_conditioned and self.training and self.cond_drop_prob > 0:
            dropped = torch.rand(batch) < self.cond_drop_prob
            conditioning = None if conditioning is None else conditioning.expand(batch).without_items(dropped)
            packed = self.layout.without_conditions(packed, dropped)
        condition_tensors = self.condition_tensors(conditioning, batch)
        hidden = self.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1], condition_tensors)
        return self._score(hidden, packed.ids[:, 1:], packed.loss_mask[:, 1:])

    def _score(self, hidden: Tensor, targets: Tensor, wanted: Tensor) -> TokenLoss:
        """Cross-entropy of the cells that count; logits are computed for no others.

        Args:
            hidden: `[b, rows, d]`; each row predicts the row of `targets` of the same number.
            targets: `[b, rows, columns]` ids.
            wanted: `[b, rows, columns]` bool, cells that count.
        """
        sums: dict[str, Tensor] = {}
        for index, head in enumerate(self.layout.heads):
            own = wanted & (targets >= head.first_id) & (targets < head.first_id + head.num_logits)
            item, row, _ = own.nonzero(as_tuple=True)
            logits = self.logits(hidden[item, row], index)
            local = targets[own] - head.first_id
            nats = F.cross_entropy(logits, local, reduction="sum")
            hits = (logits.detach().argmax(dim=-1) == local).sum()
            score = torch.stack((nats, hits.to(nats.dtype), nats.new_tensor(float(len(local)))))
            for name in self._names(head):
                sums[name] = sums[name] + score if name in sums else score
        nats, hits, count = torch.stack([sums[stream.name] for stream in self.layout.predicted]).sum(dim=0)
        return TokenLoss(
            loss=nats / count.clamp(min=1),
            per_stream={name: score[0] / score[2].clamp(min=1) for name, score in sums.items()},
            accuracy=hits.detach() / count.clamp(min=1),
        )

    def _names(self, head: Head) -> tuple[str, ...]:
        """Names under which the score of a head counts."""
        has_levels = sum(other.stream == head.stream for other in self.layout.heads) > 1
        return (head.stream, f"{head.stream}.{head.level}") if has_levels else (head.stream,)

    # parts that training and decoding share

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.embedding.weight.device

    def new_cache(self, batch: int, num_positions: int) -> KVCache:
        """Allocate an empty cache for `batch` sequences of up to `num_positions` positions, the condition included."""
        return self.transformer.new_cache(batch, num_positions)

    def condition_tensors(self, conditioning: Conditions | None, batch: int) -> ConditionTensors:
        """What the stack hears beside the rows of tokens.

        Args:
            conditioning: Conditions of 1 or `batch` items; a part that is missing is unconditional.
            batch: Number of items b.

        Returns:
            The condition_tensors: codes as a prefix, text as a prefix before them or as states.

        Raises:
            ValueError: If a condition is given to a model that takes none, or fits neither width nor batch.
        """
        codes = None if conditioning is None else conditioning.codes
        text = None if conditioning is None else conditioning.text
        parts: list[Tensor] = []
        skip = states = states_mask = None
        if self._takes("codes", self.cond_dim, codes, "audio_text_condition=True or a cond_dim"):
            parts.append(self._codes(codes, batch))
        if self._takes("text", self.text_dim, text, "a text_dim"):
            states, states_mask = self._states(text, batch)
            if self.text_as == "prefix":
                states, skip = _padded_in_front(states, states_mask)
                parts.insert(0, states)
                states = states_mask = None
        return ConditionTensors(torch.cat(parts, dim=1) if parts else None, skip, states, states_mask)

    def _takes(self, name: str, width: int | None, given: ConditionTensor | None, needed: str) -> bool:
        """Whether the model takes a kind of condition; ValueError if what is given does not fit it."""
        if given is not None and width is None:
            raise ValueError(f"this model takes no condition of {name}; build it with {needed}")
        if given is not None and given.embeddings.shape[-1] != width:
            raise ValueError(f"the model takes {name} conditions of width {width}, got {given.embeddings.shape[-1]}")
        return width is not None

    def _codes(self, codes: ConditionTensor | None, batch: int) -> Tensor:
        """Embeddings of codes `[b, m, d]`, the null embedding where none stands."""
        if codes is None:
            return repeat(self.null_embedding, "d -> b m d", b=batch, m=self.null_tokens)
        codes = codes.expand(batch)
        weight = self.cond_projection.weight
        mask = codes.mask.to(weight.device).unsqueeze(-1)
        embedded = self.cond_norm(self.cond_projection(_emptied(codes.embeddings.to(weight), mask)))
        return torch.where(mask, embedded, self.null_embedding)

    def _states(self, text: ConditionTensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """States of texts `[b, s, d]` and which are real `[b, s]`; an item without any has one null state."""
        weight = self.text_projection.weight
        if text is None:
            nothing = torch.zeros(batch, 1, weight.shape[1], device=weight.device)
            text = ConditionTensor(nothing, torch.zeros(batch, 1, dtype=torch.bool))
        text = text.expand(batch)
        mask = text.mask.to(weight.device)
        states = self.text_norm(self.text_projection(_emptied(text.embeddings.to(weight), mask.unsqueeze(-1))))
        states = torch.where(mask.unsqueeze(-1), states, self.null_text)
        is_first = torch.arange(mask.shape[1], device=mask.device) == 0
        return states, mask | (is_first & ~mask.any(dim=1, keepdim=True))

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor,
        condition_tensors: ConditionTensors | None = None,
        cache: KVCache | None = None,
        cache_positions: CachePositions | None = None,
    ) -> Tensor:
        """Read rows of tokens.

        Args:
            ids: `[b, n, columns]` ids.
            mask: `[b, n, columns]` bool, True where a token stands.
            condition_tensors: What stands before the rows and beside them; with a cache, in its first call only.
            cache: Cache that holds what came before, written in place.
            cache_positions: Where prefix and rows belong in it.

        Returns:
            Final state `[b, n, d]` of every row, from which the next row is predicted.
        """
        cells = rearrange(ids.masked_fill(~mask, self.layout.num_ids), "b n c -> (b n) c")
        x = F.embedding_bag(cells, self.embedding.weight, mode="sum", padding_idx=self.layout.num_ids)
        return self.transformer(
            rearrange(x, "(b n) d -> b n d", b=len(ids)),
            condition_tensors,
            cache=cache,
            cache_positions=cache_positions,
        )

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """Logits `[..., num_logits]` float32 of one head for states `[..., d]`."""
        return self.heads[head](hidden).float()


def _emptied(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Zeros in the padding: NaN there would reach the weights, since even a gradient of 0 times NaN is NaN."""
    return embeddings.masked_fill(~mask, 0)


def _padded_in_front(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move real states `[b, s, d]` behind the padding; gives them and how much padding each item has, None = none.

    The distance from a state to the rows behind it must not depend on how long other texts of the batch are.
    """
    num_padding = (~mask).sum(dim=1)
    if not num_padding.any():
        return states, None
    order = mask.int().argsort(dim=1, stable=True)
    return states.gather(1, order.unsqueeze(-1).expand_as(states)), num_padding
