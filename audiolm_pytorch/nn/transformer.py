"""The transformer that language models and encoders use: a stack of blocks that are built from parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.attention import AttentionContext, CrossAttention, SelfAttention
from audiolm_pytorch.nn.layers import Dropout, FeedForward, GatedFeedForward, NormFactory, norm_factory
from audiolm_pytorch.nn.positions import RelativePositions, RotaryPositions, SinusoidalPositions, WavePositionBias

__all__ = [
    "INIT_STD",
    "Block",
    "FeedForwardName",
    "FusedConditions",
    "Transformer",
    "build_encoder",
    "visible_positions",
]

INIT_STD = 0.02  # of GPT-2; the first logits are near zero, so that training starts at chance level

FeedForwardName = Literal["gated", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, eq=False)
class FusedConditions:
    """Projected conditions of a model: the additional inputs of its transformer. Attention ignores their padding.

    Attributes:
        prefix: m embeddings `[b, m, d]` in front of the rows, padded on the left; None = no prefix.
        prefix_padding: `[b]` int64, number of padding embeddings in `prefix`; None = no padding.
        states: `[b, s, d]` states for cross-attention, padded on the right; None = no states.
        states_mask: `[b, s]` bool, False at padding; at least one state of each item is not padding.
        row_sums: Embeddings `[b, r, d]` that are added to the first r rows, one to each row; the last embedding is also
            added to all later rows. None = no sum.
    """

    prefix: Tensor | None = None
    prefix_padding: Tensor | None = None
    states: Tensor | None = None
    states_mask: Tensor | None = None
    row_sums: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[1]


def visible_positions(num_rows: int, padding: Tensor | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Mask of causal attention, `[b or 1, 1, n, n]` bool: each row attends to itself and to earlier rows.

    `padding [b]` int64 is the number of padding rows in front of each item. A padding row attends only to itself.
    """
    visible = torch.ones(1, 1, num_rows, num_rows, dtype=torch.bool, device=device).tril()
    if padding is None:
        return visible
    keys = torch.arange(num_rows, device=device)
    is_own = torch.eye(num_rows, dtype=torch.bool, device=device)
    return (visible & (keys >= rearrange(padding.to(device), "b -> b 1 1 1"))) | is_own


class Block(nn.Module):
    """Pre-norm block of self-attention, optional cross-attention and feed-forward layer with residual connections.

    Args:
        attention: Module that receives normalised rows `[b, n, d]` and an `AttentionContext`.
        feed_forward: Module that receives normalised rows `[b, n, d]`.
        cross: Cross-attention after `attention`; None = no cross-attention.
        dropout: Dropout probability of the outputs of attention, cross-attention and feed-forward layer.
    """

    def __init__(
        self,
        attention: SelfAttention,
        feed_forward: nn.Module,
        norm: NormFactory,
        dim: int,
        cross: CrossAttention | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(dim), attention
        self.cross_norm, self.cross = None if cross is None else norm(dim), cross
        self.feed_forward_norm, self.feed_forward = norm(dim), feed_forward
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Apply the block to rows `[b, n, d]`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), context))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """Stack of pre-norm blocks and a final norm, for language models (`causal`) and encoders.

    The stages of MusicLM (arXiv:2301.11325, sec. 4.2) have 24 layers of width 1024 with 16 heads, feed-forward layers
    of width 4096, and relative positions of T5.

    Args:
        ff_mult: Width of the hidden layer of the feed-forward layer, divided by `dim`.
        dropout: Dropout probability of the residual branches and inside the feed-forward layer. Attention weights have
            no dropout, because fused kernels do not support it.
        norm: `rms`, `layer`, or a function that creates a norm from its width.
        feed_forward: `gated` (SwiGLU), `gelu`, `gelu_tanh`, `relu`, or a module class that is created with the width.
        positions: `rotary`; `relative` (biases of T5 by distance, shared by all blocks; causal only); `sinusoidal`
            (added to the inputs); or `none` (the caller adds positions to the inputs).
        position_bias: Bias of self-attention by the offset of two positions, shared by all blocks, in addition to
            `positions`.
        causal: Whether each row attends only to itself and to earlier rows.
        kv_heads: Heads of keys and values, a divisor of `heads`; 1 = multi-query, None = `heads`.
        cross: Whether every block also attends to the states of `FusedConditions`.
        checkpoint_blocks: Whether to store only the input of each block, and to compute the block again in the backward
            pass. This recomputation needs the memory of one block instead of `depth` blocks, and a third more time.
        forget_prob: Largest probability with which training hides past rows from attention. Each item has a random
            probability from 0 to `forget_prob` (forgetful causal masking, arXiv:2210.13432).
        init_std: Standard deviation of initial weights; None = `fan_in ** -0.5`.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: float = 4.0,
        dropout: float = 0.0,
        norm: Literal["rms", "layer"] | NormFactory = "rms",
        feed_forward: FeedForwardName | NormFactory = "gated",
        positions: Literal["rotary", "relative", "sinusoidal", "none"] = "rotary",
        position_bias: WavePositionBias | None = None,
        causal: bool = True,
        bias: bool = False,
        kv_heads: int | None = None,
        cross: bool = False,
        checkpoint_blocks: bool = False,
        forget_prob: float = 0.0,
        init_std: float | None = INIT_STD,
    ) -> None:
        super().__init__()
        if min(dim, depth, heads, dim_head, ff_mult) <= 0:
            raise ValueError(f"sizes must be positive, got {dim=} {depth=} {heads=} {dim_head=} {ff_mult=}")
        if not 0 <= forget_prob < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"forget_prob and dropout must be in [0, 1), got forget_prob={forget_prob} and dropout={dropout}"
            )
        if not causal and (positions == "relative" or forget_prob):
            raise ValueError("relative positions and forget_prob need causal=True; use other positions, or a mask")
        self.dim, self.depth, self.causal = dim, depth, causal
        self.heads, self.kv_heads, self.dim_head = heads, heads if kv_heads is None else kv_heads, dim_head
        self.checkpoint_blocks, self.forget_prob = checkpoint_blocks, forget_prob
        self.ff_mult, self.dropout, self.feed_forward = ff_mult, dropout, feed_forward
        self.positions, self.bias, self.cross, self.init_std = positions, bias, cross, init_std
        self.rotary = RotaryPositions(dim_head) if positions == "rotary" else None
        self.relative = RelativePositions(heads) if positions == "relative" else None
        self.sinusoidal = SinusoidalPositions(dim) if positions == "sinusoidal" else None
        self.position_bias = position_bias
        make_norm, width = norm_factory(norm), round(dim * ff_mult)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(dim, heads, dim_head, kv_heads, bias),
                _feed_forward(feed_forward, dim, width, bias, float(dropout)),
                make_norm,
                dim,
                CrossAttention(dim, heads, dim_head, bias) if cross else None,
                float(dropout),
            )
            for _ in range(depth)
        )
        self.norm = make_norm(dim)
        self._init_weights(init_std)

    def _init_weights(self, std: float | None) -> None:
        """Draw normal weights; the last layer of a residual branch has `std / sqrt(2 depth)` (GPT-2, sec. 2.3)."""
        if self.relative is not None:
            nn.init.normal_(self.relative.bias.weight, std=INIT_STD if std is None else std)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                is_branch_output = name.endswith(("to_out.weight", "down.weight"))
                scale = (2 * self.depth) ** -0.5 if is_branch_output else 1.0
                nn.init.normal_(parameter, std=scale * (parameter.shape[1] ** -0.5 if std is None else std))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        conditions: FusedConditions | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        keys_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Apply all blocks to sequences `x [b, n, d]`; return normalised rows without the rows of the prefix.

        Args:
            mask: `[b, n]` bool, False at padding, at least one True per item; None = no padding. Outputs at padding are
                finite but have no meaning. Causal stacks need no mask, because their padding is on the right. With a
                prefix, the mask includes the prefix.
            positions: Positions of the rows in any order, `[n]`, `[b, n]` or `[b, n, axes]`; None = 0..n-1. Rotary
                positions use the first axis, `position_bias` uses all axes, other positions need None.
            keys_values: If it is a list, each block appends keys and values `[b, kv_heads, n, dim_head]`, for a cache.
        """
        conditions = FusedConditions() if conditions is None else conditions
        x = self._inputs(x, conditions)
        context = self._attention_context(x, conditions, mask, positions, keys_values)
        for block in self.blocks:
            x = self._apply_block(block, x, context)
        return self.norm(x[:, conditions.num_rows :])

    @typed
    def hidden_states(
        self, x: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None, layers: Sequence[int | None]
    ) -> list[Tensor]:
        """Return the rows `[b, n, d]` after each block in `layers`; blocks after the last of these are not computed.

        `layers` are block numbers: 1..depth, or 0 for the input of the first block. The returned rows are not
        normalised. An entry None is the output of `forward`. `forward` documents `x`, `mask` and `positions`.
        """
        if not all(layer is None or 0 <= layer <= self.depth for layer in layers):
            raise ValueError(f"layers must be in 0..{self.depth}, got {tuple(layers)}")
        x = self._inputs(x, FusedConditions())
        context = self._attention_context(x, FusedConditions(), mask, positions, None)
        blocks = {self.depth if layer is None else layer for layer in layers}
        states = {0: x}  # only of the requested layers, to save memory without gradients
        for layer, block in enumerate(list(self.blocks)[: max(blocks, default=0)], start=1):
            x = self._apply_block(block, x, context)
            if layer in blocks:
                states[layer] = x
        return [self.norm(states[self.depth]) if layer is None else states[layer] for layer in layers]

    def _apply_block(self, block: nn.Module, x: Tensor, context: AttentionContext) -> Tensor:
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, context, use_reentrant=False))
        return cast(Tensor, block(x, context))

    def _inputs(self, x: Tensor, conditions: FusedConditions) -> Tensor:
        """Add `row_sums` and sinusoidal positions to rows `[b, n, d]`, and prepend the prefix."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [b, n, {self.dim}], got shape {tuple(x.shape)}")
        if conditions.row_sums is not None:
            rows = torch.arange(x.shape[1], device=x.device).clamp(max=conditions.row_sums.shape[1] - 1)
            x = x + conditions.row_sums[:, rows].to(x.dtype)
        if conditions.prefix is not None:
            x = torch.cat((conditions.prefix.to(x.dtype), x), dim=1)
        if self.sinusoidal is not None:
            places = torch.arange(x.shape[1], device=x.device)
            if conditions.prefix_padding is not None:  # position 0 is the first row after the padding
                padding = conditions.prefix_padding.to(x.device)
                places = (places - rearrange(padding, "b -> b 1")).clamp(min=0)
            x = x + self.sinusoidal(places).to(x.dtype)
        return x

    def _attention_context(
        self,
        x: Tensor,
        conditions: FusedConditions,
        mask: Tensor | None,
        positions: Tensor | None,
        keys_values: list[tuple[Tensor, Tensor]] | None,
    ) -> AttentionContext:
        """Prepare positions, mask and states once for all blocks."""
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        places = self._checked_positions(x, positions)
        hidden = self._hidden_positions(x, conditions.num_rows)
        is_causal, has_bias = False, any(part is not None for part in (conditions.prefix_padding, hidden, mask))
        if self.causal and not has_bias and self.relative is None:
            # In a branch, because torch.compile would otherwise pass a symbol to the kernel, not a bool.
            is_causal = True
        bias = None if mask is None else rearrange(mask, "b k -> b 1 1 k")
        if self.causal and not is_causal:
            visible = visible_positions(x.shape[1], conditions.prefix_padding, x.device)
            bias = visible if bias is None else visible & bias
            bias = bias if hidden is None else bias & ~hidden
        if self.relative is not None and bias is not None:
            by_distance = self.relative(places[..., 0], x.shape[1]).to(x.dtype)
            bias = by_distance.masked_fill(~bias, float("-inf"))
        states_mask = conditions.states_mask
        return AttentionContext(
            angles=None if self.rotary is None else self.rotary(places[..., 0]),
            bias=bias,
            is_causal=is_causal,
            waves=None if self.position_bias is None else self.position_bias(places),
            states=conditions.states,
            cross_mask=None if states_mask is None else rearrange(states_mask, "b s -> b 1 1 s"),
            keys_values=keys_values,
        )

    def _checked_positions(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Check the positions of rows `x [b, n, d]`, and return them as `[b or 1, n, axes]`."""
        if positions is not None and (self.relative is not None or self.sinusoidal is not None):
            raise ValueError("relative and sinusoidal positions are numbered from 0; pass positions=None")
        places = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        places = places.unsqueeze(0) if places.ndim == 1 else places
        places = places.unsqueeze(2) if places.ndim == 2 else places
        axes = places.shape[-1] if self.position_bias is None else self.position_bias.num_axes
        if places.shape not in ((1, x.shape[1], axes), (x.shape[0], x.shape[1], axes)):
            shape = tuple(places.shape)
            raise ValueError(f"positions of rows {tuple(x.shape)} must be [b or 1, n, {axes}], got {shape}")
        return places

    def _hidden_positions(self, x: Tensor, num_prefix: int) -> Tensor | None:
        """Draw the keys to hide, `[b, 1, n, n]` bool; the prefix, the first row and a row itself stay visible."""
        if not self.training or self.forget_prob == 0:
            return None
        batch, num_rows, _ = x.shape
        share = torch.rand(batch, 1, device=x.device) * self.forget_prob
        hidden = torch.rand(batch, num_rows, device=x.device) < share
        hidden[:, : num_prefix + 1] = False
        is_own_row = torch.eye(num_rows, dtype=torch.bool, device=x.device)
        return rearrange(hidden, "b k -> b 1 1 k") & ~is_own_row


def _feed_forward(
    feed_forward: FeedForwardName | NormFactory, dim: int, hidden_dim: int, bias: bool, dropout: float
) -> nn.Module:
    """Build the feed-forward layer of a block."""
    if not isinstance(feed_forward, str):
        return feed_forward(dim)
    if feed_forward != "gated":
        return FeedForward(dim, hidden_dim, feed_forward, bias, dropout)
    if bias:
        raise ValueError("the gated feed-forward layer has no biases; set bias=False, or use another feed_forward")
    return GatedFeedForward(dim, hidden_dim, dropout)


@typed
def build_encoder(
    dim: int,
    depth: int,
    heads: int,
    dim_head: int = 64,
    ff_mult: int = 4,
    dropout: float = 0.0,
    position_bias: WavePositionBias | None = None,
) -> Transformer:
    """Build a bidirectional stack with rotary positions for an encoder.

    The feed-forward layers cost as much as layers of width `ff_mult * dim` without a gate.
    """
    if min(dim, depth, heads, dim_head, ff_mult) < 1:
        raise ValueError(f"sizes must be at least 1, got {dim=} {depth=} {heads=} {dim_head=} {ff_mult=}")
    # With the factor 2 / 3, a gated layer costs as much as a layer without a gate.
    hidden_dim = max(8, 8 * round(dim * ff_mult * 2 / 3 / 8))
    return Transformer(
        dim=dim,
        depth=depth,
        heads=heads,
        dim_head=dim_head,
        ff_mult=hidden_dim / dim,
        dropout=dropout,
        position_bias=position_bias,
        causal=False,
        init_std=None,
    )
