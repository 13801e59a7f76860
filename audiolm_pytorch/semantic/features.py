"""Hidden states of a corpus on disk: which crops are taken, written as shards once, read back in portions."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.data import AudioItem, BatchPlan, CropDataset, collate_crops
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.semantic.base import FrameEncoder

__all__ = ["CropPlan", "FeatureShards", "plan_crops", "write_features"]

logger = logging.getLogger(__name__)

_FIELD = "features"
# Of float32 numbers, for what is computed between two writes and for what is read at once.
_CHUNK_BYTES = 2**24
_PORTION_BYTES = 2**25
# Crops that are encoded together hold about a minute of sound.
_MOST_CROPS_AT_ONCE, _SECONDS_AT_ONCE = 8, 60


@dataclass(frozen=True)
class CropPlan:
    """The crops whose frames are wanted.

    Attributes:
        crops: Pass over the files and index of the file of each.
        frames: Frames wanted of each; all it has, but for the last one.
    """

    crops: list[tuple[int, int]]
    frames: list[int]


def plan_crops(
    encoder: FrameEncoder, items: Sequence[AudioItem], seconds: float, max_frames: int, seed: int
) -> CropPlan:
    """Choose crops: one of every file in a random order, then another one of every file that is long enough for it.

    Args:
        encoder: Counts the frames.
        items: The files.
        seconds: Length of a crop.
        max_frames: Where to stop.
        seed: Of the order.

    Returns:
        The plan, of exactly `max_frames` frames if the files give so many.

    Raises:
        ValueError: If there are no files, or none gives a frame.
    """
    if not items:
        raise ValueError("there is no audio to learn from: the list of files is empty")
    rate_hz = encoder.sample_hz
    lengths = [-(-item.num_samples * rate_hz // item.sample_hz) for item in items]
    frames = [_frames_or_none(encoder, min(length, round(seconds * rate_hz))) for length in lengths]
    passes = [int(length / (seconds * rate_hz) + 1e-6) or 1 if count else 0 for length, count in zip(lengths, frames)]
    short = [str(item.path) for item, count in zip(items, frames) if not count]
    if len(short) == len(items):
        raise ValueError(
            f"none of {len(items)} files gives a frame in crops of {seconds:g} s at {rate_hz} Hz; "
            "take longer crops or longer files"
        )
    if short:
        logger.warning("left out %d of %d files, shorter than one frame: %s", len(short), len(items), short[:5])
    plan = CropPlan([], [])
    order = BatchPlan(len(items), 1, seed)
    missing = max_frames
    for step in range(max(passes) * len(items)):
        epoch, index = order.indices(step)[0]
        if passes[index] > epoch:
            plan.crops.append((epoch, index))
            plan.frames.append(min(frames[index], missing))
            missing -= plan.frames[-1]
            if not missing:
                break
    return plan


def _frames_or_none(encoder: FrameEncoder, num_samples: int) -> int:
    """Frames of a wave, 0 where it is too short for one."""
    try:
        return encoder.num_frames(num_samples)
    except ValueError:
        return 0


def write_features(
    folder: Path,
    encoder: FrameEncoder,
    items: Sequence[AudioItem],
    plan: CropPlan,
    *,
    layer: int,
    seconds: float,
    seed: int,
    origin: dict[str, Any],
    advance: Callable[[], object],
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write the frames of every crop of a plan; what is there already is kept.

    Args:
        folder: Of the shards.
        encoder: A `FrameEncoder` in eval mode.
        items: The files.
        plan: The crops.
        layer: Whose hidden states are wanted.
        seconds: Length of a crop.
        seed: Of the places of the crops.
        origin: What tells one set of features from another.
        advance: Called after every crop.
        rank: Number of this process.
        world_size: Number of processes that share the work.

    Raises:
        ValueError: If features are not finite, or not as many as the encoder said; names the file.
    """
    at_once = min(_MOST_CROPS_AT_ONCE, max(1, int(_SECONDS_AT_ONCE / seconds)))
    dataset = CropDataset(items, seconds, (encoder.sample_hz,), seed=seed, cache_bytes=0)
    maker = _FeatureMaker(encoder, dataset, plan, layer, at_once)

    def make_record(number: int) -> dict[str, np.ndarray]:
        record = maker.features(number)
        advance()
        return {_FIELD: record}

    group_bytes = at_once * max(plan.frames) * encoder.dim * np.dtype(np.float32).itemsize
    records_per_chunk = at_once * max(1, _CHUNK_BYTES // group_bytes)
    write_shards(folder, make_record, len(plan.crops), origin, records_per_chunk, rank, world_size)


class _FeatureMaker:
    """Encodes crops in groups that stand at fixed places in the plan: where a run was interrupted changes nothing."""

    def __init__(
        self, encoder: FrameEncoder, dataset: CropDataset, plan: CropPlan, layer: int, crops_at_once: int
    ) -> None:
        self._encoder, self._dataset, self._plan, self._layer = encoder, dataset, plan, layer
        self._crops_at_once = crops_at_once
        self._group: tuple[int, list[np.ndarray]] = (-1, [])

    def features(self, number: int) -> np.ndarray:
        """Frames `[t, d]` float32 of crop `number` of the plan."""
        group, place = divmod(number, self._crops_at_once)
        if self._group[0] != group:
            first = group * self._crops_at_once
            self._group = (group, self._encode(first, min(first + self._crops_at_once, len(self._plan.crops))))
        return self._group[1][place]

    @torch.no_grad()
    def _encode(self, first: int, last: int) -> list[np.ndarray]:
        """Frames of the crops `first <= i < last`, in float32 whatever autocast says."""
        rate_hz = self._encoder.sample_hz
        batch = collate_crops([self._dataset.get(*crop) for crop in self._plan.crops[first:last]])
        device = device_of(self._encoder)
        wave, lengths = batch.waves[rate_hz].to(device), batch.lengths[rate_hz]
        with torch.autocast(device.type, enabled=False):
            features, mask = self._encoder.features(wave, lengths.to(device), self._layer)
        rows = [row[real].float().cpu() for row, real in zip(features, mask)]
        for row, length, index in zip(rows, lengths.tolist(), batch.indices):
            self._check(row, length, self._dataset.items[index].path)
        return [row[:count].numpy() for row, count in zip(rows, self._plan.frames[first:last])]

    def _check(self, row: Tensor, length: int, path: Path) -> None:
        if not row.isfinite().all():
            raise ValueError(
                f"{path}: layer {self._layer} gives NaN or infinity; the encoder is broken, or the file: leave it out"
            )
        wanted = (self._encoder.num_frames(length), self._encoder.dim)
        if row.shape != wanted:
            raise ValueError(
                f"{path}: layer {self._layer} of {type(self._encoder).__name__} gives features {tuple(row.shape)}, not "
                f"{wanted} as its num_frames and dim promise; mend the encoder"
            )


class FeatureShards:
    """The frames that `write_features` wrote, as a `VectorSource`.

    Args:
        folder: Of the shards.
        origin: As it was written.
        num_frames: Of all crops together.
        dim: Width of a frame.
        least_rows: Rows in a portion at least, as far as there are so many.
    """

    def __init__(self, folder: Path, origin: dict[str, Any], num_frames: int, dim: int, least_rows: int) -> None:
        # Crops are read in any order, each once: chunks that stayed mapped would add up to all features in memory.
        self._shards = TokenShards(folder, origin, max_open_chunks=1)
        self.num_vectors = num_frames
        self._rows = max(least_rows, _PORTION_BYTES // (dim * np.dtype(np.float32).itemsize))

    def portions(self, order: tuple[int, ...] | None = None) -> Iterator[np.ndarray]:
        """All frames `[m, d]` float32, in portions that the caller may change.

        Args:
            order: Seed of an order: crops are read in a random one, and the frames of a portion are shuffled. None is
                the order of the plan.

        Yields:
            Portions.
        """
        random = None if order is None else np.random.default_rng(order)
        numbers = np.arange(len(self._shards)) if random is None else random.permutation(len(self._shards))
        waiting: list[np.ndarray] = []
        count = 0
        for place, number in enumerate(numbers, 1):
            waiting.append(self._shards[int(number)][_FIELD])
            count += len(waiting[-1])
            if count >= self._rows or place == len(numbers):
                portion = np.concatenate(waiting)
                waiting, count = [], 0
                yield portion if random is None else portion[random.permutation(len(portion))]
