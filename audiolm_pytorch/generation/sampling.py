"""Sampling of tokens: settings, filters of logits, and one random generator per item."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed

__all__ = [
    "DEFAULT_SAMPLING",
    "SamplingSettings",
    "filter_logits",
    "item_generators",
    "item_seeds",
    "sample_tokens",
    "stage_generator",
    "update_sampling",
]

# Smallest divisor of logits: a smaller one would overflow float32 for logits of a few thousand.
_MIN_TEMPERATURE = 1e-6


@typed
@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings of one stage.

    Args:
        temperature: Divisor of the logits; below 1e-6, the most likely token is selected.
        top_k: Number of most likely tokens to sample from; None = all tokens.
        top_p: Total probability of the smallest set of most likely tokens to sample from; None = all tokens.
        guidance_scale: Scale of classifier-free guidance; 1 = no guidance, which halves the cost.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or None for all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (or be None for all tokens), got {self.top_p}")
        if not 0 <= self.guidance_scale < inf:
            raise ValueError(f"guidance_scale must be finite and not negative, got {self.guidance_scale}")


# Temperatures of MusicLM (sec. 4.2). AudioLM used 0.6, 0.8 and 0.6 for speech.
DEFAULT_SAMPLING = {
    "semantic": SamplingSettings(temperature=1.0),
    "coarse": SamplingSettings(temperature=0.95),
    "fine": SamplingSettings(temperature=0.4),
}


def update_sampling(
    settings: Mapping[str, SamplingSettings], changes: Mapping[str, SamplingSettings | Mapping[str, Any]]
) -> dict[str, SamplingSettings]:
    """Return `settings` with `changes` applied."""
    unknown = set(changes) - set(DEFAULT_SAMPLING)
    if unknown:
        raise ValueError(f"got sampling of unknown stages {sorted(unknown)}; the stages are {sorted(DEFAULT_SAMPLING)}")
    changed = {
        name: change if isinstance(change, SamplingSettings) else replace(settings[name], **change)
        for name, change in changes.items()
    }
    return {**settings, **changed}


def item_seeds(seeds: int | Sequence[int] | None, batch: int) -> list[int]:
    """Return the seed of every item: an int n means n, n + 1, ...; None draws seeds from torch's global generator."""
    if seeds is None:
        return list(torch.randint(2**62, (batch,)).tolist())
    return [seeds + item for item in range(batch)] if isinstance(seeds, int) else list(seeds)


def item_generators(seeds: Sequence[int | torch.Generator] | None, batch: int) -> list[torch.Generator]:
    """Return one CPU generator per item, so that the noise of an item depends on its seed alone."""
    sources = item_seeds(None, batch) if seeds is None else list(seeds)
    if len(sources) != batch:
        raise ValueError(f"got {len(sources)} seeds for {batch} items; pass one seed per item")
    return [seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed) for seed in sources]


def stage_generator(seed: int, stage: str) -> torch.Generator:
    """Return a generator of one item in one stage; equal noise in all stages would correlate their tokens."""
    digest = hashlib.sha256(f"{stage}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def filter_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Apply top-k, then top-p to logits `[..., v]`: set the logits of excluded tokens to minus infinity.

    The caller must already have divided the logits by the temperature. The most likely token is never excluded.
    """
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        kept = logits.topk(settings.top_k, dim=-1).indices
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
    if settings.top_p is not None and settings.top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probabilities = sorted_logits.softmax(dim=-1)
        is_outside = probabilities.cumsum(dim=-1) - probabilities >= settings.top_p
        logits = logits.masked_fill(is_outside.scatter(-1, order, is_outside), float("-inf"))
    return logits


def sample_tokens(logits: Tensor, noise: Tensor, settings: SamplingSettings) -> Tensor:
    """Sample tokens `[...]` int64 from logits `[..., v]` by inverse transform sampling; `noise [...]` is in [0, 1)."""
    logits = logits.float()
    if settings.temperature < _MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    cumulative = filter_logits(logits / settings.temperature, settings).softmax(dim=-1).cumsum(dim=-1)
    # The threshold stays below the total also after rounding, so the token has a probability above zero.
    threshold = noise.clamp(max=1 - 2**-20).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
