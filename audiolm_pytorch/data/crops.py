"""Random crops of audio files: the same instants at every sample rate that a training stage needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.resample import resample, resample_source_span
from audiolm_pytorch.data.manifest import AudioItem

__all__ = ["Crop", "CropDataset", "crop_seconds"]

# Crops begin on multiples of 40 ms: whole frames of every tokenizer at 25, 50 or 75 frames a second.
STARTS_PER_SECOND = 25
FULL_SCALE = 32768


@dataclass(frozen=True)
class Crop:
    """A stretch of one file.

    Attributes:
        waves: By sample rate in Hz: `[n]` float32 mono, or `[c, n]` of a data set of several channels; the same
            instants each, never padded.
        caption: Caption of the file, if it has one.
        labels: What else the manifest says about the file.
        index: Index of the file in the data set.
        start_seconds: Where in the file the crop begins.
        is_file_start: Whether it begins with the file.
        ends_file: Whether the file ends with it, to within 40 ms (less than a frame of tokens).
    """

    waves: dict[int, Tensor]
    caption: str | None
    labels: dict[str, Any]
    index: int
    start_seconds: float
    is_file_start: bool
    ends_file: bool


class CropDataset:
    """Crops of audio files, decoded once and kept in memory as 16-bit samples as far as they fit."""

    @beartype
    def __init__(
        self,
        items: Sequence[AudioItem],
        seconds: float | int | None,
        rates_hz: Sequence[int],
        seed: int = 0,
        cache_bytes: int = 2**30,
        channels: int = 1,
    ) -> None:
        """Set what is cropped and how.

        Args:
            items: The files, as checked by `load_items`.
            seconds: Length of a crop; a shorter file gives all it has. None takes whole files.
            rates_hz: Sample rates wanted, multiples of 25 Hz.
            seed: Seed of the positions, not negative.
            cache_bytes: Memory for decoded audio (16-bit at the highest rate wanted). The first files that fit are
                kept and the others are read from disk at every crop: which ones does not depend on the order of use, so
                that a resumed run sees the same bits.
            channels: 1 averages the channels of a file. More must be those of the file; of mono they are copies.

        Raises:
            ValueError: If a list is empty or a number is out of range.
        """
        if not items or not rates_hz:
            raise ValueError(f"need at least one item and one sample rate, got {len(items)} and {len(rates_hz)}")
        if any(hz < STARTS_PER_SECOND or hz % STARTS_PER_SECOND for hz in rates_hz):
            raise ValueError(f"sample rates must be multiples of {STARTS_PER_SECOND} Hz, got {list(rates_hz)}")
        if seed < 0 or cache_bytes < 0 or channels < 1 or (seconds is not None and round(seconds * min(rates_hz)) < 1):
            raise ValueError(
                "need seed >= 0, cache_bytes >= 0, channels >= 1, seconds > 0, got "
                f"{seed}, {cache_bytes}, {channels}, {seconds}"
            )
        self.items = list(items)
        self.seconds = seconds
        self.rates_hz = tuple(dict.fromkeys(rates_hz))
        self.seed, self.channels = seed, channels
        self._decode_hz = max(rates_hz)
        self._lengths = [-(-item.num_samples * self._decode_hz // item.sample_hz) for item in items]
        bytes_up_to = np.cumsum(self._lengths) * channels * np.dtype(np.int16).itemsize
        self._num_cached = int(np.searchsorted(bytes_up_to, cache_bytes, side="right"))
        self._cache: dict[int, tuple[np.ndarray, float]] = {}

    def __len__(self) -> int:
        """Count the files."""
        return len(self.items)

    @beartype
    def get(self, epoch: int, index: int) -> Crop:
        """Cut the crop of one file in one epoch; a pure function of the seed and the arguments.

        Args:
            epoch: Pass over the data, from 0; every epoch has a crop of its own.
            index: Index of the file.

        Returns:
            `round(seconds * rate)` samples at every rate, or fewer if the file has fewer.

        Raises:
            ValueError: If the epoch is negative or the file cannot be read any more.
            IndexError: If there is no such file.
        """
        if not 0 <= index < len(self.items):
            raise IndexError(f"there is no file {index} among {len(self.items)}")
        item, length, hz = self.items[index], self._lengths[index], self._decode_hz
        count = length if self.seconds is None else min(round(self.seconds * hz), length)
        grid = hz // STARTS_PER_SECOND
        last_step = (length - count) // grid
        step = int(np.random.default_rng([self.seed, epoch, index]).integers(last_step + 1)) if last_step else 0
        return Crop(
            waves=self._waves(index, step),
            caption=item.caption,
            labels=item.labels,
            index=index,
            start_seconds=step / STARTS_PER_SECOND,
            is_file_start=step == 0,
            ends_file=length - (step * grid + count) < grid,
        )

    def _waves(self, index: int, step: int) -> dict[int, Tensor]:
        """Cut the crop that begins at a step of the 40 ms grid, at every rate."""
        spans = {}
        for hz in self.rates_hz:
            available = -(-self._lengths[index] * hz // self._decode_hz)
            start = step * hz // STARTS_PER_SECOND
            wanted = available if self.seconds is None else round(self.seconds * hz)
            num_samples = min(wanted, available - start)
            spans[hz] = (num_samples, *resample_source_span(start, num_samples, self._decode_hz, hz))
        first = min(begin for _, begin, _, _ in spans.values())
        decoded = self._decoded(index, first, max(end for _, _, end, _ in spans.values()))
        return {
            hz: resample(decoded[..., begin - first : end - first], self._decode_hz, hz)[..., skip : skip + num_samples]
            for hz, (num_samples, begin, end, skip) in spans.items()
        }

    def _decoded(self, index: int, start: int, stop: int) -> Tensor:
        """Samples `start <= i < stop` of a file at the decoded rate `[n]` or `[c, n]`, fewer where the file ends."""
        item, hz = self.items[index], self._decode_hz
        stop = min(stop, self._lengths[index])
        if index >= self._num_cached:
            span = dict(start_seconds=start / hz, duration_seconds=(stop - start) / hz)
            return self._shaped(read_audio(item.path, hz, self.channels, **span)[0])
        if index not in self._cache:
            self._cache[index] = _to_int16(self._shaped(read_audio(item.path, hz, self.channels)[0]).numpy())
        samples, scale = self._cache[index]
        return torch.from_numpy(samples[..., start:stop] * np.float32(scale))

    def _shaped(self, wave: Tensor) -> Tensor:
        return wave[0] if self.channels == 1 else wave


def _to_int16(wave: np.ndarray) -> tuple[np.ndarray, float]:
    """16-bit samples and their scale: exact for 16-bit files at their own rate, and nothing is clipped."""
    peak = float(np.abs(wave).max(initial=0.0))
    scale = max(peak / (FULL_SCALE - 1), 1 / FULL_SCALE) if peak > (FULL_SCALE - 1) / FULL_SCALE else 1 / FULL_SCALE
    return np.round(wave / scale).astype(np.int16), scale


@beartype
def crop_seconds(
    data_max_length: int | None, data_max_length_seconds: float | int | None, sample_hz: int | None
) -> float | int | None:
    """Length of a trainer's crops, from whichever way its caller gave it.

    Args:
        data_max_length: Samples at `sample_hz`.
        data_max_length_seconds: Seconds.
        sample_hz: Rate of the tokenizer that samples are counted at; None if there is none.

    Returns:
        Seconds; None if neither was given.

    Raises:
        ValueError: If both are given, or samples without a rate.
    """
    if data_max_length is None:
        return data_max_length_seconds
    if data_max_length_seconds is not None:
        raise ValueError("give data_max_length (samples) or data_max_length_seconds, not both")
    if sample_hz is None:
        raise ValueError("data_max_length counts samples of a tokenizer; with shards give data_max_length_seconds")
    return data_max_length / sample_hz
