"""One language model over any token layout; the semantic, coarse and fine stages are declarations of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange, repeat
from torch import Tensor, nn

from audiolm_pytorch.attention import KVCache, Slots
from audiolm_pytorch.conditioning import Conditioning
from audiolm_pytorch.io import register
from audiolm_pytorch.layers import RMSNorm
from audiolm_pytorch.stages.layout import TokenLayout
from audiolm_pytorch.stages.streams import Head, PackedTokens
from audiolm_pytorch.transformer import INIT_STD, Transformer

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

    A row is embedded as the sum of its tokens; every (predicted stream, level) has a linear head of its own.
    Conditioning stands before the sequence as embeddings. Where no embedding stands, a learned null embedding does, so
    attention needs no mask but causality: right padding is never seen from the left and carries no loss.

    Args:
        layout: What is read and written.
        dim: Width d.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dim_head: Width of a head.
        ff_mult: Width inside the gated feed-forward, in multiples of `dim`.
        dropout: Dropout probability.
        cond_dim: Width of conditioning embeddings; None = the model takes none.
        cond_drop_prob: Probability that training drops an item's condition: what guidance guides away from.
        null_tokens: Null embeddings that stand for a condition where none is given at all.
        max_seconds: Longest stretch it was trained on; more is generated in windows. None = no limit.

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
    ) -> None:
        super().__init__()
        if not 0 <= cond_drop_prob <= 1 or null_tokens < 1:
            raise ValueError(f"need 0 <= cond_drop_prob <= 1 and null_tokens >= 1, got {cond_drop_prob}, {null_tokens}")
        self.layout = layout
        self.cond_dim, self.cond_drop_prob, self.null_tokens = cond_dim, cond_drop_prob, null_tokens
        self.max_seconds = max_seconds
        self._config: dict[str, Any] = {
            **{
                "dim": dim,
                "depth": depth,
                "heads": heads,
                "dim_head": dim_head,
                "ff_mult": ff_mult,
                "dropout": dropout,
            },
            **{"cond_dim": cond_dim, "cond_drop_prob": cond_drop_prob, "null_tokens": null_tokens},
        }
        self.transformer = Transformer(
            dim=dim, depth=depth, heads=heads, dim_head=dim_head, ff_mult=ff_mult, dropout=dropout
        )
        # The last embedding stands in empty cells; it is zero and stays so.
        self.embedding = nn.Embedding(layout.num_ids + 1, dim, padding_idx=layout.num_ids)
        self.heads = nn.ModuleList(nn.Linear(dim, head.num_logits, bias=False) for head in layout.heads)
        for weight in (self.embedding.weight, *self.heads.parameters()):
            nn.init.normal_(weight, std=INIT_STD)
        nn.init.zeros_(self.embedding.weight[layout.num_ids])
        if cond_dim is not None:
            self.cond_projection = nn.Linear(cond_dim, dim, bias=False)
            self.cond_norm = RMSNorm(dim)
            self.null_embedding = nn.Parameter(torch.randn(dim) * INIT_STD)
            # Conditions enter at the size of token embeddings, whatever the scale of the table they come from.
            nn.init.constant_(self.cond_norm.weight, INIT_STD)

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
    def forward(self, packed: PackedTokens, conditioning: Conditioning | None = None) -> TokenLoss:
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
        if conditioning is not None and self.training and self.cond_drop_prob > 0:
            dropped = torch.rand(batch) < self.cond_drop_prob
            conditioning = conditioning.repeated_to(batch).without_items(dropped)
        prefix = self.prefix(conditioning, batch)
        hidden = self.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1], prefix)
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

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Allocate an empty cache for `batch` sequences of up to `num_slots` positions, the condition included."""
        return self.transformer.new_cache(batch, num_slots)

    def prefix(self, conditioning: Conditioning | None, batch: int) -> Tensor | None:
        """Embeddings that stand before the sequence.

        Args:
            conditioning: Condition of 1 or `batch` items; None = unconditional.
            batch: Number of items b.

        Returns:
            `[b, m, d]`; None for a model that takes no condition.

        Raises:
            ValueError: If a conditioning is given to a model that takes none, or fits neither width nor batch.
        """
        if self.cond_dim is None:
            if conditioning is not None:
                raise ValueError("this model takes no condition; build it with audio_text_condition=True or a cond_dim")
            return None
        if conditioning is None:
            return repeat(self.null_embedding, "d -> b m d", b=batch, m=self.null_tokens)
        if conditioning.embeddings.shape[-1] != self.cond_dim:
            raise ValueError(
                f"the model takes conditions of width {self.cond_dim}, got {conditioning.embeddings.shape[-1]}"
            )
        conditioning = conditioning.repeated_to(batch)
        weight = self.cond_projection.weight
        embedded = self.cond_norm(self.cond_projection(conditioning.embeddings.to(weight)))
        return torch.where(conditioning.mask.to(weight.device).unsqueeze(-1), embedded, self.null_embedding)

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor,
        prefix: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Slots | None = None,
    ) -> Tensor:
        """Read rows of tokens.

        Args:
            ids: `[b, n, columns]` ids.
            mask: `[b, n, columns]` bool, True where a token stands.
            prefix: `[b, m, d]` embeddings that stand before the rows.
            cache: Cache that holds what came before, written in place.
            slots: Where prefix and rows belong in it.

        Returns:
            Final state `[b, n, d]` of every row, from which the next row is predicted.
        """
        cells = rearrange(ids.masked_fill(~mask, self.layout.num_ids), "b n c -> (b n) c")
        x = F.embedding_bag(cells, self.embedding.weight, mode="sum", padding_idx=self.layout.num_ids)
        x = rearrange(x, "(b n) d -> b n d", b=len(ids))
        if prefix is not None:
            x = torch.cat((prefix.to(x.dtype), x), dim=1)
        return self.transformer(x, cache, slots)[:, x.shape[1] - ids.shape[1] :]

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """Logits `[..., num_logits]` float32 of one head for states `[..., d]`."""
        return self.heads[head](hidden).float()
