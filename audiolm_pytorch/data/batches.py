"""Order and collation of crops: the batch of a step is a pure function of the step, so that resuming needs no state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.data.crops import Crop

__all__ = ["BatchPlan", "CropBatch", "collate_crops"]


@lru_cache(maxsize=4)
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch; cached, because a step uses only a few epochs."""
    return np.random.default_rng([seed, epoch]).permutation(num_items)


@dataclass(frozen=True)
class BatchPlan:
    """The order of the items: every epoch is a new permutation, and epochs follow without a gap.

    The processes of a run share one order: rank r of w receives the r-th part of every global batch.

    Args:
        num_items: Items in the data set; fewer than a batch are repeated, each time in a later epoch (another crop).
    """

    num_items: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if min(self.num_items, self.batch_size, self.world_size) < 1:
            raise ValueError(f"num_items, batch_size and world_size must be at least 1, got {self}")
        if self.seed < 0 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"need seed >= 0 and 0 <= rank < world_size, got {self}")

    def indices(self, step: int) -> list[tuple[int, int]]:
        """`batch_size` pairs of epoch and item index for a step, from 0."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        first = (step * self.world_size + self.rank) * self.batch_size
        positions = (divmod(first + offset, self.num_items) for offset in range(self.batch_size))
        return [(epoch, int(_permutation(self.num_items, self.seed, epoch)[index])) for epoch, index in positions]


@dataclass(frozen=True)
class CropBatch:
    """Crops of several files, padded with zeros to the longest.

    `waves [b, n]` and `lengths [b]` in samples are by sample rate in Hz. `ends_file [b]` is that of the crops.
    """

    waves: dict[int, Tensor]
    lengths: dict[int, Tensor]
    ends_file: Tensor


@beartype
def collate_crops(crops: Sequence[Crop]) -> CropBatch:
    """Collate crops of equal sample rates into one batch, in their order."""
    if not crops:
        raise ValueError("cannot collate an empty list of crops")
    rates_hz = list(crops[0].waves)
    if any(list(crop.waves) != rates_hz for crop in crops):
        raise ValueError(f"crops have different sample rates: {sorted({tuple(crop.waves) for crop in crops})}")
    return CropBatch(
        waves={hz: pad_sequence([crop.waves[hz] for crop in crops], batch_first=True) for hz in rates_hz},
        lengths={hz: torch.tensor([len(crop.waves[hz]) for crop in crops]) for hz in rates_hz},
        ends_file=torch.tensor([crop.ends_file for crop in crops]),
    )
