"""How the tokens of each stage are drawn: MusicLM's temperatures, what differs from them, and noise of its own."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from audiolm_pytorch.generation.sampling import SamplingSettings

__all__ = ["DEFAULT_SAMPLING", "changed_sampling", "stage_generator"]

# MusicLM, sec. 4.2; AudioLM used 0.6, 0.8, 0.6 for speech.
DEFAULT_SAMPLING = {
    "semantic": SamplingSettings(temperature=1.0),
    "coarse": SamplingSettings(temperature=0.95),
    "fine": SamplingSettings(temperature=0.4),
}


def changed_sampling(
    settings: Mapping[str, SamplingSettings], changes: Mapping[str, SamplingSettings | Mapping[str, Any]]
) -> dict[str, SamplingSettings]:
    """Exchange settings of some stages.

    Args:
        settings: Settings of all stages by name.
        changes: New ones by name: whole, or the fields that differ.

    Returns:
        Settings of all stages.

    Raises:
        ValueError: If there is no such stage, or a number is out of range.
        TypeError: If settings have no such field.
    """
    unknown = set(changes) - set(DEFAULT_SAMPLING)
    if unknown:
        raise ValueError(f"sampling is by stage, of {sorted(DEFAULT_SAMPLING)}; got {sorted(unknown)}")
    changed = {
        name: one if isinstance(one, SamplingSettings) else replace(settings[name], **one)
        for name, one in changes.items()
    }
    return {**settings, **changed}


def stage_generator(seed: int, stage: str) -> torch.Generator:
    """Make the generator of one item in one stage: did stages share noise, their tokens would be correlated."""
    digest = hashlib.sha256(f"{stage}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
