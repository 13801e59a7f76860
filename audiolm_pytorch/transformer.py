"""The one block stack that every language model of this package uses."""

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.attention import CausalSelfAttention, KVCache, Slots
from audiolm_pytorch.layers import GatedFeedForward, RMSNorm, RotaryPositions

__all__ = ["Transformer"]

INIT_STD = 0.02  # GPT-2's; keeps the first logits near zero, so that training starts at chance


class _Block(nn.Module):
    """Attention and feed-forward, each normalised on the way in and added on the way out."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = CausalSelfAttention(dim, heads, dim_head)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = GatedFeedForward(dim, ff_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache | None, layer: int, slots: Slots | None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, cache, layer, slots))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """Decoder-only stack of pre-norm blocks with rotary positions; a final norm; no biases.

    MusicLM's stages (arXiv:2301.11325, sec. 4.2) are 24 such layers of width 1024 with 16 heads and feed-forward 4096.

    Args:
        dim: Width d.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dim_head: Width of a head, even.
        ff_mult: Width inside the gated feed-forward, in multiples of `dim`.
        dropout: Probability of dropping a value of a residual branch or of the feed-forward's inside. Attention weights
            are not dropped: no fused kernel can.

    Raises:
        ValueError: If a number is not positive, or `dim_head` is odd.
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
    ) -> None:
        super().__init__()
        if min(dim, depth, heads, dim_head, ff_mult) <= 0:
            raise ValueError(f"sizes must be positive, got {dim=} {depth=} {heads=} {dim_head=} {ff_mult=}")
        self.dim, self.depth, self.heads, self.dim_head = dim, depth, heads, dim_head
        self.rotary = RotaryPositions(dim_head)
        self.blocks = nn.ModuleList(
            _Block(dim, heads, dim_head, round(dim * ff_mult), float(dropout)) for _ in range(depth)
        )
        self.norm = RMSNorm(dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Branch ends are scaled down so that the sum over 2 * depth branches keeps its size (GPT-2, sec. 2.3).
                is_branch_end = name.endswith(("to_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=INIT_STD / ((2 * depth) ** 0.5 if is_branch_end else 1.0))

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Allocate an empty cache for `batch` sequences of up to `num_slots` positions."""
        weight = self.norm.weight
        return KVCache(
            depth=self.depth,
            batch=batch,
            heads=self.heads,
            num_slots=num_slots,
            dim_head=self.dim_head,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(self, x: Tensor, cache: KVCache | None = None, slots: Slots | None = None) -> Tensor:
        """Run the stack.

        Args:
            x: Rows `[b, n, d]`: whole sequences, or, with a cache, their next rows.
            cache: Cache of `new_cache`, written in place.
            slots: Where the rows belong; needed with `cache`.

        Returns:
            Normalised rows `[b, n, d]`.

        Raises:
            ValueError: If only one of `cache` and `slots` is given.
        """
        if (cache is None) != (slots is None):
            raise ValueError("a cache needs slots and slots need a cache: give both or none")
        if slots is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        else:
            positions = slots.positions
        angles = self.rotary(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, cache, layer, slots)
        return self.norm(x)
