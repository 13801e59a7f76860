"""Audio files in and out, and resampling that keeps time exactly; the mel spectrogram (`mel.py`) is found here too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from beartype import beartype
from einops import pack, rearrange, reduce, unpack
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.mel import MelSpectrogram, mel_filterbank

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
BLOCK_FRAMES = 2**16
SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS"}


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file holds: its rate, its length in samples per channel, and its channels."""

    sample_hz: int
    num_samples: int
    channels: int


@contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a sound file; whatever libsndfile says, inside the block too, becomes a ValueError that names the path."""
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: cannot be read as audio ({error.error_string})") from error


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
    with _open(Path(path)) as file:
        return AudioInfo(sample_hz=file.samplerate, num_samples=file.frames, channels=file.channels)


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
    path = Path(path)
    num_samples = 0
    with _open(path) as file:
        for block in _blocks(file, file.frames):
            _refuse_non_finite(block, path)
            num_samples += len(block)
        info = AudioInfo(sample_hz=file.samplerate, num_samples=num_samples, channels=file.channels)
        if num_samples == 0:
            raise ValueError(f"{path}: the file holds no samples")
        # An MP3 without an index (Xing header) only guesses its length; every other format knows it.
        if num_samples < file.frames and file.format != "MP3":
            raise ValueError(f"{path}: the file is damaged, {num_samples} of {file.frames} samples can be decoded")
    return info


def _blocks(file: soundfile.SoundFile, num_frames: int) -> Iterator[np.ndarray]:
    """Read up to `num_frames` from where the file stands, in blocks `[n, c]` float32.

    One long read stops at the first hole of a damaged file, and soundfile's own `blocks` repeats old samples where a
    file ends before its header says: this does neither.
    """
    while num_frames > 0 and len(block := file.read(min(num_frames, BLOCK_FRAMES), dtype="float32", always_2d=True)):
        num_frames -= len(block)
        yield block


def _refuse_non_finite(samples: np.ndarray, path: Path) -> None:
    """Raise a ValueError that names the file if a sample is NaN or infinite."""
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")


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
    with _open(path) as file:
        from_hz, to_hz = file.samplerate, sample_hz or file.samplerate
        total = _resampled_length(file.frames, from_hz, to_hz)
        start = round(start_seconds * to_hz)
        if start >= total:
            raise ValueError(f"{path}: {start_seconds} s is at or after its end ({file.frames / from_hz:.3f} s)")
        count = total - start if duration_seconds is None else min(round(duration_seconds * to_hz), total - start)
        first, last, skip = resample_source_span(start, count, from_hz, to_hz)
        file.seek(first)
        # Mixed block by block: all channels of an hour at once would take several times the memory of the result.
        blocks = [
            _with_channels(np.ascontiguousarray(block.T), channels, path)
            for block in _blocks(file, min(last, file.frames) - first)
        ]
    if not blocks:
        raise ValueError(f"{path}: holds nothing at {start_seconds} s, though its header says so; the file is damaged")
    wave = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    _refuse_non_finite(wave, path)
    return resample(torch.from_numpy(wave), from_hz, to_hz)[:, skip : skip + count], to_hz


def _with_channels(wave: np.ndarray, channels: int | None, path: Path) -> np.ndarray:
    """Average, keep or repeat the channels of `wave [c, n]`."""
    if channels is None or channels == len(wave):
        return wave
    if channels == 1:
        return reduce(wave, "c n -> 1 n", "mean")
    if len(wave) == 1:
        return np.repeat(wave, channels, axis=0)
    raise ValueError(
        f"{path}: has {len(wave)} channels, {channels} were asked for; use channels=1 (average) or None (keep)"
    )


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
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUBTYPES:
        raise ValueError(f"{path}: cannot write {suffix or 'a name without suffix'}; use one of {', '.join(SUBTYPES)}")
    if wave.ndim not in (1, 2) or wave.numel() == 0:
        raise ValueError(f"{path}: wave must be [n] or [c, n] with at least one sample, got shape {tuple(wave.shape)}")
    samples = wave.detach().to("cpu", torch.float32).numpy()
    _refuse_non_finite(samples, path)
    columns = samples[:, None] if samples.ndim == 1 else rearrange(samples, "c n -> n c")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{suffix}")
    try:
        with soundfile.SoundFile(
            partial, "w", samplerate=sample_hz, channels=columns.shape[1], subtype=SUBTYPES[suffix]
        ) as file:
            # In blocks: libsndfile's Vorbis encoder puts what one call brings on the stack, and long files overflow it.
            for begin in range(0, len(columns), BLOCK_FRAMES):
                file.write(columns[begin : begin + BLOCK_FRAMES])
        os.replace(partial, path)
    except soundfile.LibsndfileError as error:
        shape = f"{columns.shape[1]} channels at {sample_hz} Hz"
        raise ValueError(f"{path}: cannot be written ({shape}: {error.error_string})") from error
    finally:
        partial.unlink(missing_ok=True)


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


def _resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Length after resampling: the last instant that any input sample stands for is still covered."""
    return -(-num_samples * to_hz // from_hz)


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
    num_out = _resampled_length(wave.shape[-1], from_hz, to_hz)
    # soxr rounds the length; zeros behind the end (which it assumes there anyway) let us cut to the ceiling instead.
    padded = F.pad(wave.detach().to("cpu", torch.float32), (0, from_hz // to_hz + 2))
    flat, leading = pack([padded], "* n")
    rows = [soxr.resample(row, from_hz, to_hz, quality="HQ")[:num_out] for row in flat.numpy()]
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
