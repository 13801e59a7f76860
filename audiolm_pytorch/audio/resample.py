"""Resampling of whole waves, of parts of waves and of streams, with the quality "HQ" of the soxr library."""

from math import gcd
from typing import Any

import numpy as np
import soxr
import torch
from einops import pack, rearrange, unpack
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.audio.waves import MAX_HZ, MIN_HZ, check_channels, check_rate, check_samples
from audiolm_pytorch.checks.types import typed

__all__ = ["StreamingResampler", "resample", "resample_source_span", "resampled_items", "resampled_length"]

_QUALITY = "HQ"
# Reach of the soxr HQ filter, in samples of the lower of the two rates. Samples at a distance of more than 160 do not
# change float32 results (measured for eleven pairs of rates between 8 and 96 kHz); the rest is a margin.
_REACH_SAMPLES = 256


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Number of samples of a wave after resampling, rounded up."""
    return -(-num_samples * to_hz // from_hz)


def _check_rates(from_hz: int, to_hz: int) -> None:
    """Check that resampling does not need a memory that is thousands of times larger than the wave."""
    low, high = min(from_hz, to_hz), max(from_hz, to_hz)
    if not 1 <= low <= high <= min(MAX_HZ, low * MAX_HZ // MIN_HZ):
        raise ValueError(
            f"cannot resample from_hz={from_hz} to to_hz={to_hz}; sample rates of audio are in {MIN_HZ}..{MAX_HZ} Hz"
        )


def _flush_samples(from_hz: int, to_hz: int) -> int:
    """Number of zeros to append to a wave, so that soxr returns at least `resampled_length` samples."""
    return from_hz // to_hz + 2


@typed
def resample(wave: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample `wave [..., n]` without delay. The resampled wave has no gradient.

    Returns:
        Wave `[..., ceil(n * to_hz / from_hz)]` float32 on the device of `wave`; `wave` itself if both rates are equal.
    """
    check_samples(wave)
    _check_rates(from_hz, to_hz)
    if not wave.ndim:
        raise ValueError("wave must be [..., n], got a tensor without axes")
    if from_hz == to_hz:
        return wave
    num_out = resampled_length(wave.shape[-1], from_hz, to_hz)
    padded = F.pad(wave.detach().to("cpu", torch.float32), (0, _flush_samples(from_hz, to_hz)))
    flat, leading = pack([padded], "* n")
    rows = [soxr.resample(row, from_hz, to_hz, quality=_QUALITY)[:num_out] for row in flat.numpy()]
    out = torch.from_numpy(np.stack(rows)) if rows else padded.new_zeros(0, num_out)
    return unpack(out, leading, "* n")[0].to(wave.device)


def resampled_items(wave: Tensor, from_hz: int, to_hz: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Resample every item of `wave [b, n]` without its padding, so that padding does not change the result.

    Returns:
        The resampled waves, padded with zeros to the longest, and the number of samples `[b]` of each wave.
    """
    check_rate(from_hz, "input_sample_hz")
    samples = [wave.shape[1]] * len(wave) if lengths is None else checked_lengths(lengths, wave).tolist()
    items = [resample(item[:length], from_hz, to_hz) for item, length in zip(wave, samples)]
    return pad_sequence(items, batch_first=True), torch.tensor([len(item) for item in items], device=wave.device)


@typed
def resample_source_span(start: int, count: int, from_hz: int, to_hz: int) -> tuple[int, int, int]:
    """Find the samples of a wave from which a part of the resampled wave can be computed.

    Returns:
        Indices `(first, last, skip)`; the part is `resample(wave[first:last], from_hz, to_hz)[skip : skip + count]`.
        The index `last` can be larger than the length of the wave.
    """
    if from_hz == to_hz:
        return start, start + count, 0
    common = gcd(from_hz, to_hz)
    source_step, target_step = from_hz // common, to_hz // common
    reach = _REACH_SAMPLES * from_hz // min(from_hz, to_hz) + 1
    # The first sample must be at a time that is a sample at both rates.
    first = max(start * from_hz // to_hz - reach, 0) // source_step * source_step
    last = -(-(start + count) * from_hz // to_hz) + reach
    return first, last, start - first // source_step * target_step


class StreamingResampler:
    """Resamples a wave that arrives in chunks; the concatenated output equals `resample` of the whole wave.

    The output is float32 on the CPU and has no gradient.
    """

    @typed
    def __init__(self, from_hz: int, to_hz: int, channels: int) -> None:
        _check_rates(from_hz, to_hz)
        check_channels(channels)
        self.from_hz, self.to_hz, self.channels = from_hz, to_hz, channels
        self.num_received = self.num_returned = 0
        self._is_finished = False
        self._stream: Any = None
        if from_hz != to_hz:
            self._stream = soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32", quality=_QUALITY)

    @typed
    def push(self, wave: Tensor) -> Tensor:
        """Resample a chunk `[c, n]`; return the samples `[c, m]` that do not depend on later chunks (m can be 0)."""
        if self._is_finished:
            raise ValueError("the wave is finished; create another StreamingResampler for another wave")
        check_samples(wave)
        if wave.ndim != 2 or len(wave) != self.channels:
            raise ValueError(f"wave must be [{self.channels}, n], got shape {list(wave.shape)}")
        wave = wave.detach().to("cpu", torch.float32)
        self.num_received += wave.shape[-1]
        output = wave if self._stream is None else self._resample(wave)
        self.num_returned += output.shape[-1]
        return output

    def finish(self) -> Tensor:
        """Return the remaining samples `[c, n]` after the last chunk; a later call of `push` raises a ValueError."""
        self._is_finished = True
        remaining = resampled_length(self.num_received, self.from_hz, self.to_hz) - self.num_returned
        if self._stream is None or remaining <= 0:
            return torch.zeros(self.channels, 0)
        zeros = torch.zeros(self.channels, _flush_samples(self.from_hz, self.to_hz))
        output = self._resample(zeros, last=True)[:, :remaining]
        self.num_returned += output.shape[-1]
        return output

    def _resample(self, wave: Tensor, last: bool = False) -> Tensor:
        columns = np.ascontiguousarray(rearrange(wave.numpy(), "c n -> n c"))
        output = self._stream.resample_chunk(columns, last=last)
        return torch.from_numpy(np.ascontiguousarray(rearrange(output, "n c -> c n")))
