"""The causal transformer that all language models use."""

from dataclasses import dataclass
from typing import Literal

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audiolm_pytorch.nn.attention import AttentionContext, CausalSelfAttention, CrossAttention
from audiolm_pytorch.nn.kv_cache import CachePositions, KVCache, visible_positions
from audiolm_pytorch.nn.layers import GatedFeedForward, RelativePositions, RMSNorm, RotaryPositions

__all__ = ["INIT_STD", "ConditionTensors", "Transformer"]

INIT_STD = 0.02  # of GPT-2; the first logits are near zero, so that training starts at chance level


@dataclass(frozen=True, eq=False)
class ConditionTensors:
    """Conditioning inputs of a transformer as tensors. Attention ignores their padding.

    Attributes:
        prefix: `[b, m, d]` embeddings in front of the rows, padded on the left; None = no prefix.
        prefix_padding: `[b]` int64, number of padding embeddings in `prefix`; None = no padding.
        states: `[b, s, d]` states for cross-attention, padded on the right; None = no states.
        states_mask: `[b, s]` bool, False at padding; at least one state of each item is not padding.
        row_sums: `[b, r, d]`, added to the first r rows; the last one is also added to later rows. None = no sum.
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


class _Block(nn.Module):
    """Pre-norm block of self-attention, optional cross-attention and feed-forward layer with residual connections."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, kv_heads: int | None, ff_dim: int, dropout: float, cross: bool
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = CausalSelfAttention(dim, heads, dim_head, kv_heads)
        self.cross_norm = RMSNorm(dim) if cross else None
        self.cross = CrossAttention(dim, heads, dim_head) if cross else None
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = GatedFeedForward(dim, ff_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        x = x + self._dropped(self.attention(self.attention_norm(x), context, layer))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self._dropped(self.cross(self.cross_norm(x), context, layer))
        return x + self._dropped(self.feed_forward(self.feed_forward_norm(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Apply dropout. Skip it in eval mode, where calls of dropout modules would take 5 % of the decoding time."""
        return self.dropout(branch) if self.training and self.dropout.p > 0 else branch


class Transformer(nn.Module):
    """Decoder-only stack of pre-norm blocks with rotary or relative positions and a final norm; no biases.

    The stages of MusicLM (arXiv:2301.11325, sec. 4.2) have 24 layers of width 1024 with 16 heads, feed-forward layers
    of width 4096, and relative positions of T5.

    Args:
        dim: Width d.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dim_head: Width of a head; must be even for rotary positions.
        ff_mult: Width of the gated feed-forward layer divided by `dim`.
        dropout: Dropout probability of the residual branches and inside the feed-forward layer. Attention weights have
            no dropout, because fused kernels do not support it.
        positions: `rotary`, or `relative` (biases of T5 by distance, shared by all blocks).
        kv_heads: Heads of keys and values, a divisor of `heads`; 1 = multi-query, None = `heads`.
        cross: Whether every block also attends to the states of `ConditionTensors`.
        checkpoint_blocks: Whether to store only the input of each block, and to compute the block again in the backward
            pass. This needs the memory of one block instead of `depth` blocks, and a third more time.
        forget_prob: Largest probability with which training hides past rows from attention. The probability is drawn
            for each item from 0..`forget_prob` (forgetful causal masking, arXiv:2210.13432).
    """

    @beartype
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: float | int = 4.0,
        dropout: float | int = 0.0,
        positions: Literal["rotary", "relative"] = "rotary",
        kv_heads: int | None = None,
        cross: bool = False,
        checkpoint_blocks: bool = False,
        forget_prob: float | int = 0.0,
    ) -> None:
        super().__init__()
        if min(dim, depth, heads, dim_head, ff_mult) <= 0:
            raise ValueError(f"sizes must be positive, got {dim=} {depth=} {heads=} {dim_head=} {ff_mult=}")
        if not 0 <= forget_prob < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"forget_prob and dropout must be in [0, 1), got forget_prob={forget_prob} and dropout={dropout}"
            )
        self.dim, self.depth, self.dim_head = dim, depth, dim_head
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.checkpoint_blocks, self.forget_prob = checkpoint_blocks, forget_prob
        self.rotary = RotaryPositions(dim_head) if positions == "rotary" else None
        self.relative = RelativePositions(heads) if positions == "relative" else None
        self.blocks = nn.ModuleList(
            _Block(dim, heads, dim_head, kv_heads, round(dim * ff_mult), float(dropout), cross) for _ in range(depth)
        )
        self.norm = RMSNorm(dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Smaller outputs of the branches keep the size of their sum over 2 * depth branches (GPT-2, sec. 2.3).
                is_branch_output = name.endswith(("to_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=INIT_STD / ((2 * depth) ** 0.5 if is_branch_output else 1.0))

    def new_cache(self, batch: int, num_positions: int) -> KVCache:
        """Allocate an empty cache for `batch` sequences of up to `num_positions` rows, prefix included."""
        weight = self.norm.weight
        # On a CPU, torch 2.13's attention of a single row is far slower in bfloat16 than in float32.
        is_cpu_half = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        return KVCache(
            depth=self.depth,
            batch=batch,
            heads=self.kv_heads,
            num_positions=num_positions,
            dim_head=self.dim_head,
            device=weight.device,
            dtype=torch.float32 if is_cpu_half else weight.dtype,
        )

    def forward(
        self,
        x: Tensor,
        condition_tensors: ConditionTensors | None = None,
        *,
        cache: KVCache | None = None,
        cache_positions: CachePositions | None = None,
    ) -> Tensor:
        """Apply all blocks; return normalised rows `[b, n, d]`, without the rows of the prefix.

        Args:
            x: Rows `[b, n, d]`. Without a cache they are whole sequences, with a cache they are the next rows.
            condition_tensors: Prefix and states; with a cache, only in the first call.
            cache: Cache from `new_cache`, written in place.
            cache_positions: Positions of prefix and rows in `cache`.
        """
        if (cache is None) != (cache_positions is None):
            raise ValueError("got only one of `cache` and `cache_positions`; pass both or neither")
        conditions = ConditionTensors() if condition_tensors is None else condition_tensors
        x = x.to(self.norm.weight.dtype)  # with half weights, norms and sums of branches can have full precision
        x = _with_row_sums(x, conditions, cache, cache_positions)
        if conditions.prefix is not None:
            x = torch.cat((conditions.prefix.to(x.dtype), x), dim=1)
        if cache is not None and conditions.prefix is not None:
            cache.prefix_padding = conditions.prefix_padding
        context = self._attention_context(x, conditions, cache, cache_positions)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, context, layer, use_reentrant=False)
            else:
                x = block(x, context, layer)
        return self.norm(x[:, conditions.num_rows :])

    def _attention_context(
        self, x: Tensor, conditions: ConditionTensors, cache: KVCache | None, cache_positions: CachePositions | None
    ) -> AttentionContext:
        """Prepare positions, mask and states once for all blocks."""
        if cache_positions is None or cache is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
            num_keys, is_first, padding = x.shape[1], True, conditions.prefix_padding
        else:
            positions, num_keys, padding = cache_positions.positions, cache_positions.extent, cache.prefix_padding
            is_first = cache_positions.start == 0 and num_keys == x.shape[1]
        forgotten = self._forgotten(x, conditions.num_rows) if cache is None else None
        is_one_row = cache_positions is not None and cache_positions.start is not None and x.shape[1] == 1
        is_causal = False
        if is_first and padding is None and forgotten is None and self.relative is None:
            is_causal = (
                True  # in a branch, because torch.compile would otherwise pass a symbol to the kernel, not a bool
            )
        bias: Tensor | None = None
        if not is_causal and not (is_one_row and padding is None):
            bias = visible_positions(positions, num_keys, padding)
            bias = bias if forgotten is None else bias & ~forgotten
        if self.relative is not None:
            # The cache can be more precise than the rows.
            by_distance = self.relative(positions, num_keys).to(x.dtype if cache is None else cache.keys.dtype)
            bias = by_distance if bias is None else by_distance.masked_fill(~bias, float("-inf"))
        cross_mask = None if conditions.states_mask is None else rearrange(conditions.states_mask, "b s -> b 1 1 s")
        if cache is not None and conditions.states is None:
            cross_mask = cache.cross_mask
        elif cache is not None:
            cache.cross_mask = cross_mask
        return AttentionContext(
            angles=None if self.rotary is None else self.rotary(positions),
            bias=bias,
            is_causal=is_causal,
            cache=cache,
            cache_positions=cache_positions,
            states=conditions.states,
            cross_mask=cross_mask,
        )

    def _forgotten(self, x: Tensor, num_prefix: int) -> Tensor | None:
        """Draw the keys to hide, `[b, 1, n, n]` bool; the prefix, the first row and a row itself stay visible."""
        if not self.training or self.forget_prob == 0:
            return None
        batch, num_rows, _ = x.shape
        share = torch.rand(batch, 1, device=x.device) * self.forget_prob
        hidden = torch.rand(batch, num_rows, device=x.device) < share
        hidden[:, : num_prefix + 1] = False
        is_own_row = torch.eye(num_rows, dtype=torch.bool, device=x.device)
        return rearrange(hidden, "b k -> b 1 1 k") & ~is_own_row


def _with_row_sums(
    x: Tensor, conditions: ConditionTensors, cache: KVCache | None, cache_positions: CachePositions | None
) -> Tensor:
    """Add the embeddings of conditions to rows `[b, n, d]`; the cache stores the embeddings for the next rows."""
    sums = conditions.row_sums
    if cache is not None:
        if sums is not None:
            cache.row_sums, cache.num_prefix = sums, conditions.num_rows
        sums = cache.row_sums
    if sums is None:
        return x
    rows = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    if cache is not None and cache_positions is not None:
        rows = cache_positions.positions[:, -x.shape[1] :] - cache.num_prefix
    items = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x + sums[items, rows.clamp(max=sums.shape[1] - 1)].to(x.dtype)
