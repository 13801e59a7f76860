"""Cache of attention keys and values that decoding writes in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

__all__ = ["CachePositions", "KVCache", "visible_positions"]


@dataclass(frozen=True)
class CachePositions:
    """Where in the cache the rows of one call belong; every item has a position of its own.

    Attributes:
        positions: `[b, n]` int64, position of each row in its item's sequence.
        extent: Number of positions in use after the call, the largest position + 1.
        start: Position of the first row, where it is the same for all items; None = it differs.
    """

    positions: Tensor
    extent: int
    start: int | None

    @classmethod
    @beartype
    def after(cls, starts: Sequence[int], count: int, device: torch.device | str = "cpu") -> "CachePositions":
        """Positions of the next `count` rows of items that have `starts` rows already.

        Args:
            starts: Rows of each item that came before.
            count: Rows of this call.
            device: Where the model runs.

        Returns:
            The positions.
        """
        positions = torch.tensor(starts).unsqueeze(1) + torch.arange(count)
        start = starts[0] if min(starts) == max(starts) else None
        return cls(positions.to(device), max(starts) + count, start)


def visible_positions(positions: Tensor, num_positions: int, skip: Tensor | None = None) -> Tensor:
    """Mask of the keys that each row attends to: those up to its own position, without padding in front.

    Args:
        positions: `[b or 1, n]` int64, slot of each row.
        num_positions: Number of keys.
        skip: `[b]` int64, positions of padding in front of each item; a row of padding reads itself alone.

    Returns:
        `[b or 1, 1, n, num_positions]` bool.
    """
    keys = torch.arange(num_positions, device=positions.device)
    own = rearrange(positions, "b n -> b 1 n 1")
    if skip is None:
        return own >= keys
    return ((own >= keys) & (keys >= rearrange(skip, "b -> b 1 1 1"))) | (own == keys)


class KVCache:
    """Keys and values of all layers: allocated once, written in place, never moved.

    Args:
        depth: Number of layers.
        batch: Number of items b.
        heads: Number of heads of keys and values g.
        num_positions: Longest sequence.
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
        num_positions: int,
        dim_head: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.keys = torch.zeros(depth, batch, heads, num_positions, dim_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        # What the first call brings and later ones find here: padding in front, keys and values of other states.
        self.skip: Tensor | None = None
        self.crossed: dict[int, tuple[Tensor, Tensor]] = {}
        self.cross_mask: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """Longest sequence that fits."""
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor, cache_positions: CachePositions) -> tuple[Tensor, Tensor]:
        """Write keys and values `[b, g, n, d]` of a layer in place; return views of all keys and values in use."""
        for kept, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if cache_positions.start is not None:
                kept[:, :, cache_positions.start : cache_positions.extent] = new
            else:
                index = rearrange(cache_positions.positions, "b n -> b 1 n 1").expand(new.shape)
                kept.scatter_(2, index, new.to(kept.dtype))
        return self.keys[layer][:, :, : cache_positions.extent], self.values[layer][:, :, : cache_positions.extent]
