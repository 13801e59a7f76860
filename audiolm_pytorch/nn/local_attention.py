"""Causal attention of each frame to a window of recent frames."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.layers import GatedFeedForward, RMSNorm
from audiolm_pytorch.nn.positions import RotaryPositions, rotate
from audiolm_pytorch.nn.streaming import StreamState

__all__ = ["LocalAttention", "LocalTransformer"]

_DIM_HEAD = 64


class LocalAttention(nn.Module):
    """Causal self-attention of each frame to itself and to the `window - 1` frames before it.

    Rotary positions affect the scores only by the distance of two frames. The output of a frame therefore does not
    depend on its position in a recording or on the division of the recording into chunks.

    Args:
        window: Number of frames to which each frame attends; the frame itself is included.
        heads: Number of heads of width 64; None = `dim // 64`.
    """

    @typed
    def __init__(self, dim: int, window: int, heads: int | None = None) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1 (only the frame itself), got {window}")
        self.window, self.heads = window, heads or max(1, dim // _DIM_HEAD)
        self.to_qkv = nn.Linear(dim, 3 * self.heads * _DIM_HEAD, bias=False)
        self.to_out = nn.Linear(self.heads * _DIM_HEAD, dim, bias=False)
        self.positions = RotaryPositions(_DIM_HEAD)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Attend from each of the frames `[b, f, d]` to its window; `state` contains the frames of earlier chunks."""
        qkv = rearrange(self.to_qkv(x), "b f (three h d) -> three b h f d", three=3, h=self.heads)
        queries, memory = qkv[0], qkv[1:]
        if state is not None:
            past = state.past(self)
            memory = memory if past is None else torch.cat([past, memory], dim=3)
            state.keep(self, memory[:, :, :, max(0, memory.shape[3] - self.window + 1) :])
        # chunks of `window` queries with their keys, so that memory grows linearly with the length
        num_past = memory.shape[3] - queries.shape[2]
        if is_traced():  # the number of chunks would become a constant
            return self.to_out(rearrange(self._attend(queries, *memory), "b h f d -> b f (h d)"))
        outputs = []
        for start in range(0, queries.shape[2], self.window):
            chunk = queries[:, :, start : start + self.window]
            first, last = num_past + start - self.window + 1, num_past + start + chunk.shape[2]
            outputs.append(self._attend(chunk, *memory[:, :, :, max(0, first) : last]))
        return self.to_out(rearrange(torch.cat(outputs, dim=2), "b h f d -> b f (h d)"))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from queries `[b, h, n, d]` of the last n frames to keys `[b, h, m, d]` of all m frames."""
        key_positions = torch.arange(keys.shape[2], device=keys.device)
        query_positions = key_positions[keys.shape[2] - queries.shape[2] :]
        distance = rearrange(query_positions, "n -> n 1") - key_positions
        cos, sin = self.positions(key_positions)
        num_past = keys.shape[2] - queries.shape[2]
        return F.scaled_dot_product_attention(
            rotate(queries, cos[num_past:], sin[num_past:]),
            rotate(keys, cos, sin),
            values,
            attn_mask=(distance >= 0) & (distance < self.window),
        )


class _Block(nn.Module):
    """Transformer block: pre-norm local attention and gated feed-forward layer with residual connections."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim), LocalAttention(dim, window)
        self.feed_forward_norm, self.feed_forward = RMSNorm(dim), GatedFeedForward(dim, hidden_dim=2 * dim)

    def forward(self, x: Tensor, state: StreamState | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), state)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LocalTransformer(nn.Module):
    """Stack of transformer blocks with local causal attention; with `depth=0` the frames do not change."""

    @typed
    def __init__(self, dim: int, depth: int, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(dim, window) for _ in range(depth)])

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Apply all blocks to frames `[b, f, d]`; `state` contains the frames of earlier chunks."""
        for block in self.blocks:
            x = block(x, state)
        return x
