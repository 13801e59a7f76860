"""Drawing tokens: settings, logit filters, and noise of each item's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from beartype import beartype
from torch import Tensor

__all__ = ["SamplingSettings", "filter_logits", "item_generators", "sample_tokens"]


# Logits of a few thousand, divided by less, leave the range of float32 and would become NaN.
_LEAST_TEMPERATURE = 1e-6


@beartype
@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn.

    Args:
        temperature: Divides the logits; 0 (or what would overflow them, below 1e-6) takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; None = all.
        top_p: Draw from the fewest likeliest tokens that hold this probability together; None = all.
        guidance_scale: Classifier-free guidance; 1 = off, at half the cost.

    Raises:
        ValueError: If a number is out of range.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = None
    guidance_scale: float | int = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or None for all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (or be None for all tokens), got {self.top_p}")
        if not 0 <= self.guidance_scale < inf:
            raise ValueError(f"guidance_scale must be finite and not negative, got {self.guidance_scale}")


def item_generators(seeds: Sequence[int | torch.Generator] | None, batch: int) -> list[torch.Generator]:
    """Make one CPU generator per item, so that an item's noise depends on nothing but its seed.

    Args:
        seeds: Seed (or generator, continued) of every item; None draws seeds from torch's global generator.
        batch: Number of items.

    Returns:
        A generator per item.

    Raises:
        ValueError: If there are not as many seeds as items.
    """
    chosen = torch.randint(2**62, (batch,)).tolist() if seeds is None else list(seeds)
    if len(chosen) != batch:
        raise ValueError(f"need one seed per item: {batch} items, {len(chosen)} seeds")
    return [seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed) for seed in chosen]


def filter_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Set the logits of tokens that may not be drawn to minus infinity (top-k, then top-p of what is left).

    Args:
        logits: `[..., v]`, temperature applied.
        settings: What to keep; the likeliest token always stays.

    Returns:
        `[..., v]`.
    """
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        kept = logits.topk(settings.top_k, dim=-1).indices
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = (before >= settings.top_p).scatter(-1, order, before >= settings.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def sample_tokens(logits: Tensor, noise: Tensor, settings: SamplingSettings) -> Tensor:
    """Draw tokens by inverting the cumulative distribution at given noise.

    Args:
        logits: `[n, v]`.
        noise: `[n]`, uniform in [0, 1).
        settings: Temperature and filters.

    Returns:
        `[n]` int64 in [0, v).
    """
    logits = logits.float()
    if settings.temperature < _LEAST_TEMPERATURE:
        return logits.argmax(dim=-1)
    cumulative = filter_logits(logits / settings.temperature, settings).softmax(dim=-1).cumsum(dim=-1)
    # Below the total even after rounding, so that the token found has a probability above zero.
    threshold = noise.clamp(max=1 - 2**-20).unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative <= threshold).sum(dim=-1)
