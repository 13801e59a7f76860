"""Causal self-attention and cross-attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.nn.kv_cache import CachePositions, KVCache
from audiolm_pytorch.nn.layers import Projection, rotate

__all__ = [
    "AttentionContext",
    "CausalSelfAttention",
    "CrossAttention",
    "attend",
    "prefers_plain_product",
]

# In bfloat16 on a CPU, plain matrix products are three times as fast as torch 2.13's fused kernel at training lengths
# (258 rows, batch 16, forward and backward, one core: 12 ms, not 36 ms). Longer sequences need too much memory for it.
_PLAIN_PRODUCT_MAX_ROWS = 1024


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Positions, masks, cache and states for the attention of a transformer; all blocks share them.

    Attributes:
        angles: Cosines and sines of rotary positions, `[b or 1, n, dim_head]` each; None = no rotary positions.
        bias: `[b or 1, h or 1, n, k]`, float that is added to the attention scores, or a bool mask; None = no bias.
        is_causal: True: row i attends to keys 0..i. False: every row attends to all keys that `bias` allows.
        cache: Keys and values of earlier rows; None = there are no earlier rows.
        cache_positions: Positions of the rows in `cache`.
        states: `[b, s, d]` states for cross-attention; with a cache, only in the first call.
        cross_mask: `[b, 1, 1, s]` bool, False where `states` are padding.
    """

    angles: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    is_causal: bool
    cache: KVCache | None = None
    cache_positions: CachePositions | None = None
    states: Tensor | None = None
    cross_mask: Tensor | None = None


def prefers_plain_product(queries: Tensor) -> bool:
    """Whether attention by plain matrix products is faster than torch's fused attention for queries `[b, h, n, d]`."""
    is_cpu_bf16 = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    return is_cpu_bf16 and queries.shape[2] <= _PLAIN_PRODUCT_MAX_ROWS


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Compute scaled dot-product attention `[b, h, n, d]` with the fastest method for the device.

    Args:
        queries: `[b, h, n, d]`.
        keys: `[b, g, k, d]`; g divides h. Each head of keys and values serves h / g consecutive heads of queries.
        values: `[b, g, k, d]`.
        bias: Float that is added to the scores, or a bool mask; broadcastable to `[b, h, n, k]`.
        is_causal: True: row i attends to keys 0..i, and `bias` must be None.
    """
    shared = queries.shape[1] != keys.shape[1]
    if shared and queries.shape[2] == 1:
        # Heads that share keys become rows of one head: the kernel then reads the keys once, not once per query head
        # (2000 keys of 1 head for 8 query heads, one core: 80 us, not 160 us).
        grouped = rearrange(queries, "b (g r) 1 d -> b g r d", g=keys.shape[1])
        if bias is not None and bias.shape[1] != 1:
            bias = rearrange(bias, "b (g r) 1 k -> b g r k", g=keys.shape[1])
        return rearrange(attend(grouped, keys, values, bias), "b g r d -> b (g r) 1 d")
    if not prefers_plain_product(queries):
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, is_causal=is_causal, enable_gqa=shared
        )
    if shared:
        keys, values = (part.repeat_interleave(queries.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    num_rows = queries.shape[2]
    if is_causal:
        bias = torch.full((num_rows, num_rows), float("-inf"), dtype=queries.dtype, device=queries.device).triu(1)
    elif bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros((), dtype=queries.dtype, device=queries.device).masked_fill(~bias, float("-inf"))
    if bias is not None and bias.ndim == 2:
        flat = [rearrange(part, "b h n d -> (b h) n d") for part in (queries, keys, values)]
        scores = torch.baddbmm(bias, flat[0], flat[1].mT, alpha=queries.shape[-1] ** -0.5)
        return rearrange(scores.softmax(dim=-1) @ flat[2], "(b h) n d -> b h n d", b=len(queries))
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1) @ values


class CausalSelfAttention(nn.Module):
    """Causal self-attention: multi-head, grouped-query (arXiv 2305.13245) or multi-query (arXiv 1911.02150).

    Args:
        dim: Width of inputs and outputs.
        heads: Number of attention heads h.
        dim_head: Width of a head.
        kv_heads: Number of heads of keys and values, a divisor of `heads`; 1 = multi-query, None = `heads`.
    """

    @beartype
    def __init__(self, dim: int, heads: int, dim_head: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} and heads={heads}")
        self.to_qkv = Projection(dim, (heads + 2 * self.kv_heads) * dim_head)
        self.to_out = Projection(heads * dim_head, dim)

    def forward(self, x: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        """Attend from rows `x [b, n, d]` to themselves and earlier rows; `layer` is the index in the cache."""
        num_rotated = self.heads + self.kv_heads
        # With half weights a projection returns a lower precision than its input.
        qkv = self.to_qkv(x).to(x.dtype).unflatten(-1, (num_rotated + self.kv_heads, -1))  # b n (p d) -> b n p d
        rotated = qkv[:, :, :num_rotated]
        if context.angles is not None:
            cos, sin = context.angles
            rotated = rotate(rotated, cos.unsqueeze(2), sin.unsqueeze(2))
        parts = rotated[:, :, : self.heads], rotated[:, :, self.heads :], qkv[:, :, num_rotated:]
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        if context.cache is not None and context.cache_positions is not None:
            keys, values = context.cache.write(layer, keys, values, context.cache_positions)
            queries = queries.to(keys.dtype)
        out = attend(queries, keys, values, context.bias, context.is_causal)
        return self.to_out(out.transpose(1, 2).flatten(2).to(x.dtype))  # b h n d -> b n (h d)


class CrossAttention(nn.Module):
    """Multi-head attention from every row to conditioning states, for example those of a text encoder.

    Args:
        dim: Width of inputs, outputs and states.
        heads: Number of attention heads h.
        dim_head: Width of a head.
    """

    @beartype
    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Projection(dim, heads * dim_head)
        self.to_kv = Projection(dim, 2 * heads * dim_head)
        self.to_out = Projection(heads * dim_head, dim)

    def forward(self, x: Tensor, context: AttentionContext, layer: int = 0) -> Tensor:
        """Attend from rows `[b, n, d]` to conditioning states: those of `context` or, if cached, of the cache."""
        if context.states is not None:
            kv = rearrange(self.to_kv(context.states).to(x.dtype), "b s (two h d) -> two b h s d", two=2, h=self.heads)
            keys, values = kv[0].contiguous(), kv[1].contiguous()
            if context.cache is not None:
                context.cache.cross_keys_values[layer] = keys, values
        elif context.cache is not None and layer in context.cache.cross_keys_values:
            keys, values = context.cache.cross_keys_values[layer]
        else:
            raise ValueError("cross-attention needs states: pass ConditionTensors with states in the first call")
        queries = rearrange(self.to_q(x).to(x.dtype), "b n (h d) -> b h n d", h=self.heads)
        out = attend(queries, keys, values, context.cross_mask)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))
