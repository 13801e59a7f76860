"""Order of training items, which depends only on the seed and the step, and collation of crops to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.crops import Crop

__all__ = ["BatchPlan", "CropBatch", "collate_crops", "padded_waves"]


@lru_cache(maxsize=4)
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    """Return the random order of the items in an epoch, as an array of item indices."""
    return np.random.default_rng([seed, epoch]).permutation(num_items)


@dataclass(frozen=True)
class BatchPlan:
    """Random order of training items; every epoch is a new permutation, and a batch may contain items of two epochs.

    All processes use the same order; in each step, the processes receive successive batches, in order of rank.

    Args:
        num_items: Number of items in the data set. If the data set is smaller than a batch, an item occurs in the batch
            several times, with different epoch numbers and therefore different crops.
        offset: Number of items by which a run is ahead of a run that had this number of items per step from step 0.
    """

    num_items: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if min(self.num_items, self.batch_size, self.world_size) < 1:
            raise ValueError(f"num_items, batch_size and world_size must be at least 1, got {self}")
        if self.seed < 0 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"the order of items needs seed >= 0 and 0 <= rank < world_size, got {self}")

    def indices(self, step: int) -> list[tuple[int, int]]:
        """Return the `batch_size` pairs (epoch, item index) for the batch of a step; steps count from 0."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        first = self.offset + (step * self.world_size + self.rank) * self.batch_size
        positions = (divmod(first + offset, self.num_items) for offset in range(self.batch_size))
        return [(epoch, int(_permutation(self.num_items, self.seed, epoch)[index])) for epoch, index in positions]


@dataclass(frozen=True)
class CropBatch:
    """Batch of crops of several audio files, padded with zeros to the length of the longest crop.

    `waves` and `lengths` map each sample rate in Hz to waves `[b, n]` or `[b, c, n]` and to lengths `[b]` in samples.
    `ends_file [b]` is True for crops that end where their file ends.
    """

    waves: dict[int, Tensor]
    lengths: dict[int, Tensor]
    ends_file: Tensor


@typed
def collate_crops(crops: Sequence[Crop]) -> CropBatch:
    """Collate crops into one batch, in which item i is `crops[i]`; all crops need the same sample rates."""
    if not crops:
        raise ValueError("cannot collate an empty list of crops; pass at least one crop")
    rates_hz = list(crops[0].waves)
    if any(list(crop.waves) != rates_hz for crop in crops):
        raise ValueError(f"all crops need the same sample rates, got {sorted({tuple(crop.waves) for crop in crops})}")
    return CropBatch(
        waves={hz: padded_waves([crop.waves[hz] for crop in crops]) for hz in rates_hz},
        lengths={hz: torch.tensor([crop.waves[hz].shape[-1] for crop in crops]) for hz in rates_hz},
        ends_file=torch.tensor([crop.ends_file for crop in crops]),
    )


def padded_waves(waves: Sequence[Tensor]) -> Tensor:
    """Pad waves `[n]` or `[c, n]` with zeros at the end to a batch `[b, n]` or `[b, c, n]`."""
    longest = max(wave.shape[-1] for wave in waves)
    return torch.stack([F.pad(wave, (0, longest - wave.shape[-1])) for wave in waves])
