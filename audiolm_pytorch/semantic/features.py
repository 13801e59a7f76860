"""Hidden states of a corpus for k-means: plan crops, encode the crops, write the frames to shards, read the shards."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from audiolm_pytorch.data import BatchPlan, CropDataset, collate_crops
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.semantic.base import FrameEncoder

__all__ = ["FeatureShards", "PlannedCrop", "plan_crops", "write_features"]

logger = logger_named(__name__)

_FIELD = "features"
# Sizes of float32 features: of a chunk on disk, and of a portion that is read at a time.
_CHUNK_BYTES = 2**24
_PORTION_BYTES = 2**25
# Crops that are encoded in one batch hold about a minute of sound.
_MAX_CROPS_PER_BATCH, _SECONDS_PER_BATCH = 8, 60


class PlannedCrop(NamedTuple):
    """Crop to encode: epoch, file index, and number of frames that are used (all frames, except in the last crop)."""

    epoch: int
    item: int
    num_frames: int


def plan_crops(encoder: FrameEncoder, dataset: CropDataset, max_frames: int) -> list[PlannedCrop]:
    """List the crops to encode, with `max_frames` frames in total, or fewer frames if the files are too short.

    The list has a first crop of every file in random order, then a second crop of every long file, then a third.
    """
    items, seconds, rate_hz = dataset.items, dataset.seconds, encoder.sample_hz
    if seconds is None:
        raise ValueError("the dataset returns whole files; pass a CropDataset with `seconds`")
    lengths = [-(-item.num_samples * rate_hz // item.sample_hz) for item in items]
    frames = [_count_frames(encoder, min(length, round(seconds * rate_hz))) for length in lengths]
    passes = [int(length / (seconds * rate_hz) + 1e-6) or 1 if count else 0 for length, count in zip(lengths, frames)]
    short = [str(item.path) for item, count in zip(items, frames) if not count]
    if len(short) == len(items):
        raise ValueError(
            f"crops of {seconds:g} s of all {len(items)} files are shorter than a frame of the encoder; "
            "use longer crops or longer files"
        )
    if short:
        logger.warning("left out %d of %d files, shorter than one frame: %s", len(short), len(items), short[:5])
    plan: list[PlannedCrop] = []
    order = BatchPlan(len(items), 1, dataset.seed)
    missing = max_frames
    for step in range(max(passes) * len(items)):
        epoch, index = order.indices(step)[0]
        if passes[index] > epoch:
            plan.append(PlannedCrop(epoch, index, min(frames[index], missing)))
            missing -= plan[-1].num_frames
            if not missing:
                break
    return plan


def _count_frames(encoder: FrameEncoder, num_samples: int) -> int:
    try:
        return encoder.num_frames(num_samples)
    except ValueError:
        return 0


def write_features(
    folder: Path,
    encoder: FrameEncoder,
    dataset: CropDataset,
    plan: Sequence[PlannedCrop],
    *,
    layer: int,
    origin: dict[str, Any],
    advance: Callable[[], object],
) -> None:
    """Write the hidden states of every planned crop to `folder` in chunks, and skip chunks that are already on disk.

    `origin` describes encoder, layer and data; the function `advance` is called after every crop.
    """
    # Batches start at fixed places of the plan, so that an interruption does not change which crops share a batch.
    batch_crops = min(_MAX_CROPS_PER_BATCH, max(1, int(_SECONDS_PER_BATCH / (dataset.seconds or _SECONDS_PER_BATCH))))

    @lru_cache(maxsize=1)
    def encode_batch(number: int) -> list[np.ndarray]:
        return _encode(encoder, dataset, plan[number * batch_crops : (number + 1) * batch_crops], layer)

    def make_record(number: int) -> dict[str, np.ndarray]:
        batch, place = divmod(number, batch_crops)
        record = encode_batch(batch)[place]
        advance()
        return {_FIELD: record}

    batch_bytes = batch_crops * max(crop.num_frames for crop in plan) * encoder.dim * np.dtype(np.float32).itemsize
    records_per_chunk = batch_crops * max(1, _CHUNK_BYTES // batch_bytes)
    write_shards(folder, make_record, len(plan), origin, records_per_chunk)


@torch.no_grad()
def _encode(encoder: FrameEncoder, dataset: CropDataset, crops: Sequence[PlannedCrop], layer: int) -> list[np.ndarray]:
    """Encode crops in one batch, without autocast, and return the frames `[t, d]` float32 of each crop."""
    batch = collate_crops([dataset.get(crop.epoch, crop.item) for crop in crops])
    device = device_of(encoder)
    wave, lengths = batch.waves[encoder.sample_hz].to(device), batch.lengths[encoder.sample_hz]
    with torch.autocast(device.type, enabled=False):
        features, mask = encoder.features(wave, lengths.to(device), layer)
    records = []
    for crop, row, real, length in zip(crops, features, mask, lengths.tolist()):
        frames, path = row[real].float().cpu(), dataset.items[crop.item].path
        if not frames.isfinite().all():
            raise ValueError(
                f"{path}: layer {layer} of the encoder returns NaN or infinity; check the encoder, or remove the file"
            )
        expected = (encoder.num_frames(length), encoder.dim)
        if frames.shape != expected:
            raise ValueError(
                f"{path}: layer {layer} of {type(encoder).__name__} returns features of shape {tuple(frames.shape)}, "
                f"but its num_frames and dim require {expected}; correct the encoder"
            )
        records.append(frames[: crop.num_frames].numpy())
    return records


class FeatureShards:
    """Vectors for k-means: the `num_frames` frames of width `dim` that `write_features` wrote.

    Every array that `portions` yields has at least `min_rows` frames, except the last array.
    """

    def __init__(self, folder: Path, origin: dict[str, Any], num_frames: int, dim: int, min_rows: int) -> None:
        # Crops are read in random order: if chunks stayed mapped, all features would be in memory in the end.
        self._shards = TokenShards(folder, origin, max_open_chunks=1)
        self.num_vectors = num_frames
        self._rows = max(min_rows, _PORTION_BYTES // (dim * np.dtype(np.float32).itemsize))

    def portions(self, order: tuple[int, ...] | None = None) -> Iterator[np.ndarray]:
        """Yield all frames in several arrays; the seed `order` shuffles the crops, then the frames of each array."""
        rng = None if order is None else np.random.default_rng(order)
        numbers = np.arange(len(self._shards)) if rng is None else rng.permutation(len(self._shards))
        waiting: list[np.ndarray] = []
        count = 0
        for place, number in enumerate(numbers, 1):
            waiting.append(self._shards[int(number)][_FIELD])
            count += len(waiting[-1])
            if count >= self._rows or place == len(numbers):
                portion = np.concatenate(waiting)
                waiting, count = [], 0
                yield portion if rng is None else portion[rng.permutation(len(portion))]
