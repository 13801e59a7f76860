"""Audio files in and out, and resampling that keeps time exactly; the mel spectrogram (`mel.py`) is found here too.

What is too long to hold goes through `audio_stream.py`.
"""

from math import gcd
from pathlib import Path

import numpy as np
import soxr
import torch
from beartype import beartype
from einops import pack, rearrange, unpack
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.mel import MelSpectrogram, mel_filterbank
from audiolm_pytorch.audio.stream import (
    RESAMPLER_QUALITY,
    AudioInfo,
    AudioSource,
    AudioWriter,
    open_sound,
    refuse_non_finite,
    resampled_length,
    sound_blocks,
    with_channels,
)

__all__ = [
    "AudioInfo",
    "MelSpectrogram",
    "audio_info",
    "decoded_info",
    "mel_filterbank",
    "peak_safe",
    "read_audio",
    "resample",
    "resample_source_span",
    "write_audio",
]

# Reach of the soxr HQ filter, in samples of the lower of the two rates: beyond 160 nothing changes in float32 (measured
# over eleven pairs of rates between 8 and 96 kHz); the rest is margin.
RESAMPLE_REACH_SAMPLES = 256


@beartype
def audio_info(path: str | Path) -> AudioInfo:
    """Read the header of an audio file.

    Args:
        path: A file of any kind that libsndfile reads (wav, flac, ogg, mp3, aiff, ...).

    Returns:
        What the header says; a damaged file may hold less (see `decoded_info`).

    Raises:
        ValueError: If the file is missing, empty or not audio; the message names the path and the reason.
    """
    return AudioSource(path).info


@beartype
def decoded_info(path: str | Path) -> AudioInfo:
    """Decode a whole audio file in blocks, in little memory, and say what it really holds.

    Args:
        path: An audio file.

    Returns:
        As `audio_info`, with the number of samples that can be decoded.

    Raises:
        ValueError: If the file cannot be decoded, is damaged, holds no samples, or holds NaN or infinite samples.
    """
    source = AudioSource(path, channels=None)
    for _ in source:
        pass
    return source.info


@beartype
def read_audio(
    path: str | Path,
    sample_hz: int | None = None,
    channels: int | None = 1,
    start_seconds: float | int = 0.0,
    duration_seconds: float | int | None = None,
) -> tuple[Tensor, int]:
    """Read an audio file, or a part of it, at a given rate.

    A part equals the same slice of the whole file: it is read with the context that the resampling filter needs. Times
    are rounded to the nearest sample of the rate that is returned.

    Args:
        path: An audio file.
        sample_hz: Rate wanted; None keeps the file's own.
        channels: 1 averages all channels, None keeps them; another number must be the file's own (mono is repeated).
        start_seconds: Where to begin.
        duration_seconds: How much to read; None reads to the end, and a file that ends earlier gives less.

    Returns:
        `wave [c, n]` float32 and its sample rate in Hz.

    Raises:
        ValueError: If the file cannot be read, holds NaN, begins after its end, or has other channels than asked for.
    """
    path = Path(path)
    if start_seconds < 0 or (duration_seconds is not None and duration_seconds <= 0):
        raise ValueError(
            f"{path}: start_seconds must be >= 0 and duration_seconds > 0, got {start_seconds}, {duration_seconds}"
        )
    with open_sound(path) as file:
        from_hz, to_hz = file.samplerate, sample_hz or file.samplerate
        total = resampled_length(file.frames, from_hz, to_hz)
        start = round(start_seconds * to_hz)
        if start >= total:
            raise ValueError(f"{path}: {start_seconds} s is at or after its end ({file.frames / from_hz:.3f} s)")
        count = total - start if duration_seconds is None else min(round(duration_seconds * to_hz), total - start)
        first, last, skip = resample_source_span(start, count, from_hz, to_hz)
        file.seek(first)
        # Mixed block by block: all channels of an hour at once would take several times the memory of the result.
        blocks = [
            with_channels(np.ascontiguousarray(block.T), channels, path)
            for block in sound_blocks(file, min(last, file.frames) - first)
        ]
    if not blocks:
        raise ValueError(f"{path}: holds nothing at {start_seconds} s, though its header says so; the file is damaged")
    wave = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    refuse_non_finite(wave, path)
    return resample(torch.from_numpy(wave), from_hz, to_hz)[:, skip : skip + count], to_hz


@beartype
def write_audio(path: str | Path, wave: Tensor, sample_hz: int) -> None:
    """Write an audio file; it appears under its name only when it is complete.

    Args:
        path: Name ending in .wav (16-bit), .flac (16-bit) or .ogg (Vorbis); missing folders are made.
        wave: `[n]` or `[c, n]`, full scale is -1..1 and what lies beyond is clipped (see `peak_safe`).
        sample_hz: Sample rate in Hz.

    Raises:
        ValueError: If the suffix or the shape is none of these, a sample is not finite, or the format refuses the rate.
    """
    if wave.ndim not in (1, 2) or wave.numel() == 0:
        raise ValueError(f"{path}: wave must be [n] or [c, n] with at least one sample, got shape {tuple(wave.shape)}")
    rows = rearrange(wave, "n -> 1 n") if wave.ndim == 1 else wave
    with AudioWriter(path, sample_hz, channels=len(rows)) as writer:
        writer.write(rows)


@beartype
def peak_safe(wave: Tensor, ceiling: float = 0.99) -> Tensor:
    """Scale a wave down if, and only if, its peak exceeds a ceiling.

    Args:
        wave: Samples of any shape; one factor for all.
        ceiling: Largest magnitude allowed.

    Returns:
        The wave itself, or a copy whose peak is `ceiling`.
    """
    peak = wave.detach().abs().amax() if wave.numel() else wave.new_zeros(())
    return wave * (ceiling / peak) if peak > ceiling else wave


@beartype
def resample(wave: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample with soxr at high quality, without delay; no gradients flow through it.

    Args:
        wave: `[..., n]` at `from_hz`.
        from_hz: Its rate in Hz.
        to_hz: Rate wanted in Hz.

    Returns:
        `[..., ceil(n * to_hz / from_hz)]` float32 on the device of `wave`; the wave itself when the rates are equal.

    Raises:
        ValueError: If a rate is below 1 Hz.
    """
    if min(from_hz, to_hz) < 1:
        raise ValueError(f"sample rates must be at least 1 Hz, got {from_hz} and {to_hz}")
    if from_hz == to_hz:
        return wave
    num_out = resampled_length(wave.shape[-1], from_hz, to_hz)
    # soxr rounds the length; zeros behind the end (which it assumes there anyway) let us cut to the ceiling instead.
    padded = F.pad(wave.detach().to("cpu", torch.float32), (0, from_hz // to_hz + 2))
    flat, leading = pack([padded], "* n")
    rows = [soxr.resample(row, from_hz, to_hz, quality=RESAMPLER_QUALITY)[:num_out] for row in flat.numpy()]
    out = torch.from_numpy(np.stack(rows)) if rows else padded.new_zeros(0, num_out)
    return unpack(out, leading, "* n")[0].to(wave.device)


@beartype
def resample_source_span(start: int, count: int, from_hz: int, to_hz: int) -> tuple[int, int, int]:
    """Say which samples to resample, so that a part comes out equal to the slice of the whole resampled.

    Args:
        start: First sample wanted at `to_hz`.
        count: Samples wanted at `to_hz`.
        from_hz: Rate of the source.
        to_hz: Rate wanted.

    Returns:
        `(first, last, skip)`: resample the source's samples `first <= i < last` (`last` may lie behind its end) and
        drop the first `skip` of the result. `first` falls on an instant that is a sample at both rates.
    """
    if from_hz == to_hz:
        return start, start + count, 0
    common = gcd(from_hz, to_hz)
    source_step, wanted_step = from_hz // common, to_hz // common
    reach = RESAMPLE_REACH_SAMPLES * from_hz // min(from_hz, to_hz) + 1
    first = max(start * from_hz // to_hz - reach, 0) // source_step * source_step
    last = -(-(start + count) * from_hz // to_hz) + reach
    return first, last, start - first // source_step * wanted_step
