"""Cache of attention keys and values; decoding writes into the cache in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

__all__ = ["CachePositions", "KVCache", "visible_positions"]


@dataclass(frozen=True)
class CachePositions:
    """Cache positions of the rows that one call of a transformer adds; items can have different positions.

    Attributes:
        positions: `[b, n]` int64, position of each row in the sequence of the item.
        extent: Number of cache positions in use after the call, which is the largest position + 1.
        start: Position of the first row if it is the same for all items, else None.
    """

    positions: Tensor
    extent: int
    start: int | None

    @classmethod
    def after(cls, starts: Sequence[int], count: int, device: torch.device | str = "cpu") -> "CachePositions":
        """Positions of the next `count` rows, if item i already has `starts[i]` rows."""
        positions = torch.tensor(starts).unsqueeze(1) + torch.arange(count)
        start = starts[0] if min(starts) == max(starts) else None
        return cls(positions.to(device), max(starts) + count, start)


def visible_positions(positions: Tensor, num_keys: int, padding: Tensor | None = None) -> Tensor:
    """Mask of causal attention, `[b or 1, 1, n, num_keys]` bool: each row attends to itself and to earlier rows.

    Args:
        positions: `[b or 1, n]` int64, position of each row.
        num_keys: Number of keys.
        padding: `[b]` int64, number of padding rows in front of each item. A padding row attends only to itself.
    """
    keys = torch.arange(num_keys, device=positions.device)
    rows = rearrange(positions, "b n -> b 1 n 1")
    if padding is None:
        return rows >= keys
    return ((rows >= keys) & (keys >= rearrange(padding, "b -> b 1 1 1"))) | (rows == keys)


class KVCache:
    """Keys and values of all layers; the memory is allocated once and written in place.

    Args:
        depth: Number of layers.
        batch: Number of items b.
        heads: Number of heads of keys and values g.
        num_positions: Length of the longest sequence.
        dim_head: Width of a head.
        device: Device of the model.
        dtype: Data type of keys and values.
    """

    @beartype
    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        heads: int,
        num_positions: int,
        dim_head: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.keys = torch.zeros(depth, batch, heads, num_positions, dim_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        # The first call sets these for later calls.
        self.prefix_padding: Tensor | None = None
        self.cross_keys_values: dict[int, tuple[Tensor, Tensor]] = {}  # by layer
        self.cross_mask: Tensor | None = None
        self.row_sums: Tensor | None = None
        self.num_prefix = 0

    def write(self, layer: int, keys: Tensor, values: Tensor, cache_positions: CachePositions) -> tuple[Tensor, Tensor]:
        """Store keys and values `[b, g, n, d]` of a layer; return all keys and values of the layer, without a copy."""
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if cache_positions.start is not None:
                cached[:, :, cache_positions.start : cache_positions.extent] = new
            else:
                index = rearrange(cache_positions.positions, "b n -> b 1 n 1").expand(new.shape)
                cached.scatter_(2, index, new.to(cached.dtype))
        return self.keys[layer][:, :, : cache_positions.extent], self.values[layer][:, :, : cache_positions.extent]
