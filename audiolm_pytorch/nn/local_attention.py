"""Attention over the recent past, for the frames between the convolutions and the quantizer."""

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.streaming import StreamState
from audiolm_pytorch.nn.layers import GatedFeedForward, RMSNorm, RotaryPositions, rotate

__all__ = ["LocalAttention", "LocalTransformer"]

_DIM_HEAD = 64


class LocalAttention(nn.Module):
    """Causal self-attention in which a frame sees itself and the `window - 1` frames before it.

    Rotary positions enter the products only as differences, and are counted anew in every part of `window` frames: what
    a frame becomes does not depend on where in a recording it stands, nor on how the recording was cut.

    Args:
        dim: Width in and out.
        window: Frames that a frame sees.
        heads: Number of heads; one for every 64 values of `dim` if not given.
    """

    @beartype
    def __init__(self, dim: int, window: int, heads: int | None = None) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"a frame sees at least itself: window must be at least 1, got {window}")
        self.window, self.heads = window, heads or max(1, dim // _DIM_HEAD)
        self.to_qkv = nn.Linear(dim, 3 * self.heads * _DIM_HEAD, bias=False)
        self.to_out = nn.Linear(self.heads * _DIM_HEAD, dim, bias=False)
        self.positions = RotaryPositions(_DIM_HEAD)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Frames `[b, f, d]` to `[b, f, d]`; `state` holds the frames before, none if not given."""
        qkv = rearrange(self.to_qkv(x), "b f (three h d) -> three b h f d", three=3, h=self.heads)
        queries, memory = qkv[0], qkv[1:]
        if state is not None:
            past = state.past(self)
            memory = memory if past is None else torch.cat([past, memory], dim=3)
            state.keep(self, memory[:, :, :, max(0, memory.shape[3] - self.window + 1) :])
        # parts of `window` queries with their keys: memory grows with the length, not with its square
        num_past = memory.shape[3] - queries.shape[2]
        parts = []
        for start in range(0, queries.shape[2], self.window):
            part = queries[:, :, start : start + self.window]
            first, last = num_past + start - self.window + 1, num_past + start + part.shape[2]
            parts.append(self._attend(part, *memory[:, :, :, max(0, first) : last]))
        return self.to_out(rearrange(torch.cat(parts, dim=2), "b h f d -> b f (h d)"))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from queries `[b, h, n, d]` to the keys `[b, h, m, d]` in their window; the last n are their own."""
        places = torch.arange(keys.shape[2], device=keys.device)
        own_places = places[-queries.shape[2] :]
        distance = rearrange(own_places, "n -> n 1") - places
        cos, sin = self.positions(places)
        own_cos, own_sin = cos[-len(own_places) :], sin[-len(own_places) :]
        return F.scaled_dot_product_attention(
            rotate(queries, own_cos, own_sin),
            rotate(keys, cos, sin),
            values,
            attn_mask=(distance >= 0) & (distance < self.window),
        )


class _Block(nn.Module):
    """Attention and gated feed-forward, each on normalised frames and around a skip."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim), LocalAttention(dim, window)
        self.feed_forward_norm, self.feed_forward = RMSNorm(dim), GatedFeedForward(dim, hidden_dim=2 * dim)

    def forward(self, x: Tensor, state: StreamState | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), state)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LocalTransformer(nn.Module):
    """Blocks of local causal attention.

    Args:
        dim: Width of the frames.
        depth: Number of blocks; 0 leaves frames as they are.
        window: Frames that a frame sees in each block.
    """

    @beartype
    def __init__(self, dim: int, depth: int, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(dim, window) for _ in range(depth)])

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Frames `[b, f, d]` to `[b, f, d]`."""
        for block in self.blocks:
            x = block(x, state)
        return x
