"""Self-attention and cross-attention over whole sequences."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.positions import rotate

__all__ = ["AttentionContext", "CrossAttention", "SelfAttention", "attend"]

# In bfloat16 on a CPU, plain matrix products are three to four times as fast as torch 2.13's fused kernel at training
# lengths (258 rows, batch 16, forward and backward, one core: 12 ms, not 36 ms). Longer sequences need too much memory.
_PLAIN_PRODUCT_MAX_ROWS = 1024


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Positions, masks and states for the attention of a transformer; all blocks share them.

    Attributes:
        angles: Cosines and sines of rotary positions, `[b or 1, n, dim_head]` each; None = no rotary positions.
        bias: `[b or 1, h or 1, n or 1, n]`, float that is added to the scores, or a bool mask; None = no bias.
        is_causal: If True, row i attends to rows 0..i, and `bias` is None; if False, only `bias` excludes rows.
        waves: The result of `WavePositionBias`, two tensors `[b or 1, h, n, 2 num_waves]`; None = no such bias.
        states: `[b, s, d]` states for cross-attention.
        cross_mask: `[b, 1, 1, s]` bool, False where `states` are padding.
        keys_values: If it is a list, each block appends its keys and values `[b, kv_heads, n, dim_head]`, for a cache.
    """

    angles: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    waves: tuple[Tensor, Tensor] | None = None
    states: Tensor | None = None
    cross_mask: Tensor | None = None
    keys_values: list[tuple[Tensor, Tensor]] | None = None


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled dot-product attention with the fastest method for the device; return `[b, h, n, v]`.

    Args:
        queries: `[b, h, n, d]`, h heads of n queries.
        keys: `[b, g, k, d]`, g heads of k keys; h / g consecutive heads of queries share a head of keys and values.
        values: `[b, g, k, v]`, values of width v, which is at most d.
        bias: Float that is added to the scores, or a bool mask; broadcastable to `[b, h, n, k]`.
        is_causal: If True, row i attends to keys 0..i, and `bias` must be None.
        scale: Factor of the inner products of queries and keys; None = `d ** -0.5`.
    """
    shared = bool(queries.shape[1] != keys.shape[1])  # in a trace, sizes are tensors
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    num_rows, width = queries.shape[2], values.shape[-1]
    if queries.device.type != "cpu" or queries.dtype != torch.bfloat16 or num_rows > _PLAIN_PRODUCT_MAX_ROWS:
        # Fused kernels need values as wide as the keys. Other kernels store the matrix of all pairs.
        num_missing = queries.shape[-1] - width
        values = F.pad(values, (0, num_missing)) if num_missing else values
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=shared
        )
        return out[..., :width] if num_missing else out
    if shared:
        keys, values = (part.repeat_interleave(queries.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    if is_causal:
        bias = torch.full((num_rows, num_rows), float("-inf"), dtype=queries.dtype, device=queries.device).triu(1)
    elif bias is not None and bias.dtype == torch.bool:
        # Not minus infinity: a row that attends to nothing is padding, and must stay finite.
        bias = torch.zeros((), dtype=queries.dtype, device=queries.device).masked_fill(~bias, -1e30)
    if bias is not None and bias.ndim == 2:
        flat = [rearrange(part, "b h n d -> (b h) n d") for part in (queries, keys, values)]
        scores = torch.baddbmm(bias, flat[0], flat[1].mT, alpha=scale)
        return rearrange(scores.softmax(dim=-1) @ flat[2], "(b h) n d -> b h n d", b=queries.shape[0])
    scores = (queries * scale) @ keys.mT
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1) @ values


class SelfAttention(nn.Module):
    """Self-attention: multi-head, grouped-query (arXiv 2305.13245) or multi-query (arXiv 1911.02150).

    Args:
        kv_heads: Number g of heads of keys and values, a divisor of `heads`; 1 = multi-query, None = `heads`.
    """

    @typed
    def __init__(self, dim: int, heads: int, dim_head: int, kv_heads: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} and heads={heads}")
        self.to_qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Attend from rows `x [b, n, d]` to the rows that `context` allows."""
        num_rotated = self.heads + self.kv_heads
        qkv = self.to_qkv(x).unflatten(-1, (num_rotated + self.kv_heads, -1))  # b n (p d) -> b n p d
        rotated = qkv[:, :, :num_rotated]
        if context.angles is not None:
            cos, sin = context.angles
            rotated = rotate(rotated, cos.unsqueeze(2), sin.unsqueeze(2))
        parts = rotated[:, :, : self.heads], rotated[:, :, self.heads :], qkv[:, :, num_rotated:]
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        if context.keys_values is not None:
            context.keys_values.append((keys, values))
        scale = queries.shape[-1] ** -0.5
        if context.waves is not None:
            for_queries, for_keys = (part.to(queries.dtype).expand(x.shape[0], -1, -1, -1) for part in context.waves)
            # `attend` scales the product, and the bias must stay unscaled.
            queries = torch.cat((queries, for_queries / scale), dim=-1)
            keys = torch.cat((keys, for_keys), dim=-1)
        out = attend(queries, keys, values, context.bias, context.is_causal, scale)
        return self.to_out(out.transpose(1, 2).flatten(2))  # b h n d -> b n (h d)


class CrossAttention(nn.Module):
    """Multi-head attention from every row to conditioning states, for example those of a text encoder."""

    @typed
    def __init__(self, dim: int, heads: int, dim_head: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Project conditioning states `[b, s, d]` to keys and values `[b, h, s, dim_head]`."""
        kv = rearrange(self.to_kv(states), "b s (two h d) -> two b h s d", two=2, h=self.heads)
        return kv[0].contiguous(), kv[1].contiguous()

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Attend from rows `x [b, n, d]` to the conditioning states of `context`."""
        if context.states is None:
            raise ValueError("cross-attention needs states: pass FusedConditions with states")
        queries = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        out = attend(queries, *self.keys_values(context.states), context.cross_mask)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))
