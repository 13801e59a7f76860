"""Random crops of audio files; a crop covers the same time at every sample rate that training needs."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audio.resample import resample, resample_source_span
from audiolm_pytorch.audio.units import check_durations
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.items import AudioItem

__all__ = ["Crop", "CropDataset", "check_crop_seconds", "crop_seconds"]

# Crops begin on multiples of 40 ms: whole frames of every tokenizer at 25, 50 or 75 frames a second.
_STARTS_PER_SECOND = 25
_FULL_SCALE = 32768


@dataclass(frozen=True)
class Crop:
    """Crop of an audio file; `waves` maps each sample rate in Hz to a float32 wave `[n]` (mono) or `[c, n]`.

    `ends_file` is True if the crop ends at most 40 ms before the end of the file.
    """

    waves: dict[int, Tensor]
    start_seconds: float
    ends_file: bool


class CropDataset:
    """Data set of random crops of audio files; some of the decoded files are cached in memory.

    Args:
        seconds: Length of a crop, or None for whole files; a shorter file is returned whole.
        rates_hz: Sample rates of the crops, multiples of 25 Hz.
        cache_bytes: Maximum size of the cache of decoded audio (16-bit samples at the highest sample rate). The first
            files of `items` that fit into `cache_bytes` are cached; all other files are read from disk for every crop.
            The choice of cached files depends only on `items`, so that a resumed run has identical data.
        channels: Number of channels of a crop; 1 averages the channels of a file. If `channels` is more than 1, a file
            must have `channels` channels or be mono; a mono channel is repeated.
    """

    @typed
    def __init__(
        self,
        items: Sequence[AudioItem],
        seconds: float | None,
        rates_hz: Sequence[int],
        seed: int = 0,
        cache_bytes: int = 2**30,
        channels: int = 1,
    ) -> None:
        if not items or not rates_hz:
            raise ValueError(f"items and rates_hz must not be empty, got {len(items)} items and {len(rates_hz)} rates")
        if any(hz < _STARTS_PER_SECOND or hz % _STARTS_PER_SECOND for hz in rates_hz):
            raise ValueError(f"rates_hz must be multiples of {_STARTS_PER_SECOND} Hz, got {list(rates_hz)}")
        if seconds is not None and seconds * min(rates_hz) <= 0.5:
            raise ValueError(f"a crop needs at least one sample at {min(rates_hz)} Hz, got {seconds=}")
        if seed < 0 or cache_bytes < 0 or channels < 1:
            raise ValueError(
                f"crops need seed >= 0, cache_bytes >= 0 and channels >= 1, got {seed=}, {cache_bytes=}, {channels=}"
            )
        self.items = list(items)
        self.seconds = seconds
        self.rates_hz = tuple(dict.fromkeys(rates_hz))
        self.seed, self.channels = seed, channels
        self._decode_hz = max(rates_hz)
        self._lengths = [-(-item.num_samples * self._decode_hz // item.sample_hz) for item in items]
        self._ends = np.cumsum(self._lengths) * channels  # of the files in the cache
        num_cached = int(np.searchsorted(self._ends * np.dtype(np.int16).itemsize, cache_bytes, side="right"))
        self._num_cached = num_cached
        self._cache = _shared_zeros(int(self._ends[num_cached - 1]) if num_cached else 0, np.int16)
        self._scales = _shared_zeros(num_cached, np.float64)  # 0 for files that are not decoded yet

    def __len__(self) -> int:
        """Number of files."""
        return len(self.items)

    @typed
    def get(self, epoch: int, index: int) -> Crop:
        """Return the crop of file number `index` in an epoch; `epoch`, `index` and the seed determine the crop.

        At each sample rate, the crop has `round(seconds * sample_hz)` samples, or fewer if the file is shorter.
        """
        if not 0 <= index < len(self.items):
            raise IndexError(f"index {index} is out of range; the data set has {len(self.items)} files")
        length, hz = self._lengths[index], self._decode_hz
        count = length if self.seconds is None else round(min(self.seconds * hz, length))
        grid = hz // _STARTS_PER_SECOND
        last_step = (length - count) // grid
        step = int(np.random.default_rng([self.seed, epoch, index]).integers(last_step + 1)) if last_step else 0
        return Crop(
            waves=self._waves(index, step),
            start_seconds=step / _STARTS_PER_SECOND,
            ends_file=length - (step * grid + count) < grid,
        )

    def _waves(self, index: int, step: int) -> dict[int, Tensor]:
        """Return the waves of the crop that starts at `step * 40 ms`, by sample rate in Hz."""
        spans = {}
        for hz in self.rates_hz:
            available = -(-self._lengths[index] * hz // self._decode_hz)
            start = step * hz // _STARTS_PER_SECOND
            num_samples = available - start
            if self.seconds is not None:
                num_samples = round(min(self.seconds * hz, num_samples))
            spans[hz] = (num_samples, *resample_source_span(start, num_samples, self._decode_hz, hz))
        first = min(begin for _, begin, _, _ in spans.values())
        decoded = self._decoded(index, first, max(end for _, _, end, _ in spans.values()))
        return {
            hz: resample(decoded[..., begin - first : end - first], self._decode_hz, hz)[..., skip : skip + num_samples]
            for hz, (num_samples, begin, end, skip) in spans.items()
        }

    def _decoded(self, index: int, start: int, stop: int) -> Tensor:
        """Return samples `start <= i < stop` of a file at the highest of the `rates_hz`, `[n]` or `[c, n]`."""
        item, hz = self.items[index], self._decode_hz
        stop = min(stop, self._lengths[index])
        if index >= self._num_cached:
            span = dict(start_seconds=start / hz, duration_seconds=(stop - start) / hz)
            return self._shaped(item.read(hz, self.channels, **span))
        end = int(self._ends[index])
        samples = self._cache[end - self.channels * self._lengths[index] : end].reshape(self.channels, -1)
        if not self._scales[index]:
            wave = item.read(hz, self.channels).numpy()
            # exact for 16-bit files at their own rate, without clipping of others
            scale = max(float(np.abs(wave).max(initial=0.0)) / (_FULL_SCALE - 1), 1 / _FULL_SCALE)
            samples[:] = np.round(wave / scale).astype(np.int16)
            self._scales[index] = scale  # last, since other processes use the samples from here on
        return self._shaped(torch.from_numpy(samples[:, start:stop] * np.float32(self._scales[index])))

    def _shaped(self, wave: Tensor) -> Tensor:
        return wave[0] if self.channels == 1 else wave


def _shared_zeros(count: int, dtype: type) -> np.ndarray:
    """Return zeros that forked processes share, so that the workers of a training fill one cache.

    The system assigns memory to the zeros when they are overwritten.
    """
    return np.frombuffer(mmap.mmap(-1, max(1, count) * np.dtype(dtype).itemsize), dtype=dtype)[:count]


def check_crop_seconds(seconds: float | None, token_seconds: float) -> None:
    """Check that a crop of `seconds` (None = a whole file) has at least one token."""
    if seconds is not None and not seconds >= token_seconds:
        raise ValueError(f"got crops of {seconds} s, but a token lasts {token_seconds} s; use more seconds")


@typed
def crop_seconds(
    data_max_length: int | None, data_max_length_seconds: float | None, sample_hz: int | None
) -> float | None:
    """Return the crop length in seconds, from a length in samples or in seconds, or None if no length is passed."""
    check_durations(data_max_length=data_max_length, data_max_length_seconds=data_max_length_seconds)
    if data_max_length is None:
        return data_max_length_seconds
    if data_max_length_seconds is not None:
        raise ValueError("pass data_max_length (samples) or data_max_length_seconds, not both")
    if sample_hz is None:
        raise ValueError("got token shards and data_max_length in samples; pass data_max_length_seconds instead")
    return data_max_length / sample_hz
