"""Causal self-attention and the key/value cache that decoding writes in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.layers import rotate

__all__ = ["CausalSelfAttention", "KVCache", "Slots", "attend_causally", "prefers_plain_product"]

# At training lengths the plain product of bfloat16 matrices beats torch 2.13's fused CPU kernel three times (258 rows,
# batch 16, forward and backward: 12 ms against 36 ms on one core); beyond, its square matrix costs too much memory.
_PLAIN_PRODUCT_MAX_ROWS = 1024


@dataclass(frozen=True)
class Slots:
    """Where in the cache the rows of one call belong; every item has a position of its own.

    Attributes:
        positions: `[b, n]` int64, position of each row in its item's sequence.
        extent: Number of slots in use after the call, the largest position + 1.
        mask: `[b, 1, n, extent]` bool, which slots a row may read; None = all of them, or see `is_causal`.
        is_causal: The call fills the cache from its beginning for all items: a row reads itself and what is before.
    """

    positions: Tensor
    extent: int
    mask: Tensor | None
    is_causal: bool

    @classmethod
    @beartype
    def after(cls, starts: Sequence[int], count: int, device: torch.device | str = "cpu") -> "Slots":
        """Slots of the next `count` rows of items that have `starts` rows already.

        Args:
            starts: Rows of each item that came before.
            count: Rows of this call.
            device: Where the model runs.

        Returns:
            The slots.
        """
        extent = max(starts) + count
        positions = torch.tensor(starts).unsqueeze(1) + torch.arange(count)
        aligned = min(starts) == max(starts)
        mask = None
        if not aligned or (count > 1 and max(starts) > 0):
            mask = rearrange(positions, "b n -> b 1 n 1") >= torch.arange(extent)
        is_causal = aligned and max(starts) == 0 and count > 1
        return cls(positions.to(device), extent, mask if mask is None else mask.to(device), is_causal)


class KVCache:
    """Keys and values of all layers: allocated once, written in place, never moved.

    Args:
        depth: Number of layers.
        batch: Number of items b.
        heads: Number of attention heads h.
        num_slots: Longest sequence.
        dim_head: Width of a head.
        device: Where the model runs.
        dtype: Precision kept.
    """

    @beartype
    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        heads: int,
        num_slots: int,
        dim_head: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.keys = torch.zeros(depth, batch, heads, num_slots, dim_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write keys and values `[b, h, n, d]` of a layer into their slots; give views of all that is in use."""
        index = rearrange(slots.positions, "b n -> b 1 n 1").expand(keys.shape)
        self.keys[layer].scatter_(2, index, keys.to(self.keys.dtype))
        self.values[layer].scatter_(2, index, values.to(self.values.dtype))
        return self.keys[layer][:, :, : slots.extent], self.values[layer][:, :, : slots.extent]


def prefers_plain_product(queries: Tensor) -> bool:
    """Whether for queries `[b, h, n, d]` plain matrix products are faster than torch's fused attention."""
    is_cpu_bf16 = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
    return is_cpu_bf16 and queries.shape[2] <= _PLAIN_PRODUCT_MAX_ROWS


def attend_causally(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention over whole sequences `[b, h, n, d]`, by the fastest way the device has."""
    num_rows = queries.shape[2]
    if not prefers_plain_product(queries):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    future = torch.full((num_rows, num_rows), float("-inf"), dtype=queries.dtype).triu(1)
    flat = [rearrange(part, "b h n d -> (b h) n d") for part in (queries, keys, values)]
    scores = torch.baddbmm(future, flat[0], flat[1].mT, alpha=queries.shape[-1] ** -0.5)
    return rearrange(scores.softmax(dim=-1) @ flat[2], "(b h) n d -> b h n d", b=len(queries))


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention over the past, with rotary positions and without biases.

    Args:
        dim: Width in and out.
        heads: Number of heads h.
        dim_head: Width of a head.
    """

    @beartype
    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        layer: int = 0,
        slots: Slots | None = None,
    ) -> Tensor:
        """Attend from every row to itself and the rows before it.

        Args:
            x: Rows `[b, n, d]`.
            angles: Cosine and sine of their positions, `[1 or b, n, dim_head / 2]` each.
            cache: Cache that holds the rows before; None = `x` is the whole sequence.
            layer: Number of this layer in the cache.
            slots: Where the rows belong in the cache; needed with `cache`.

        Returns:
            `[b, n, d]`.
        """
        qkv = rearrange(self.to_qkv(x), "b n (three h d) -> b n three h d", three=3, h=self.heads)
        cos, sin = (rearrange(angle, "b n d -> b n 1 1 d") for angle in angles)
        queries, keys = rearrange(rotate(qkv[:, :, :2], cos, sin), "b n two h d -> two b h n d", two=2)
        values = rearrange(qkv[:, :, 2], "b n h d -> b h n d")
        if cache is None or slots is None:
            out = attend_causally(queries, keys, values)
        else:
            keys, values = cache.write(layer, keys, values, slots)
            out = F.scaled_dot_product_attention(
                queries.to(keys.dtype), keys, values, attn_mask=slots.mask, is_causal=slots.is_causal
            )
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))
