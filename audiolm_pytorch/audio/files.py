"""Read and write whole audio files; the module `audio.stream` processes long files in chunks."""

import io
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample, resample_source_span, resampled_length
from audiolm_pytorch.audio.stream import (
    AudioInfo,
    AudioWriter,
    check_decoded,
    open_sound,
    sound_blocks,
)
from audiolm_pytorch.audio.waves import check_channels, check_dtype, check_rate, with_channels
from audiolm_pytorch.checks.types import typed

__all__ = ["decoded_info", "peak_safe", "read_audio", "write_audio"]


@typed
def decoded_info(path: str | Path, source: io.IOBase | None = None) -> AudioInfo:
    """Return sample rate, length and number of channels of an audio file, after decoding the whole file.

    With an open binary file `source`, `path` is only its name in messages.
    """
    path = Path(path)
    with open_sound(path, source) as file:
        num_samples = sum(map(len, sound_blocks(path, file, file.frames)))
        check_decoded(path, file, num_samples)
        return AudioInfo(file.samplerate, num_samples, file.channels)


@typed
def read_audio(
    path: str | Path,
    sample_hz: int | None = None,
    channels: int | None = 1,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    source: io.IOBase | None = None,
) -> tuple[Tensor, int]:
    """Read an audio file, or a part of it, and resample it to `sample_hz`.

    A part of a file equals the same part of the whole resampled file, because resampling also reads samples before and
    after the part. `start_seconds` and `duration_seconds` are rounded to the nearest sample at `sample_hz`.

    Args:
        sample_hz: Sample rate of the returned wave (Hz); None keeps the rate of the file.
        channels: Number of returned channels; 1 averages all channels, a larger number repeats the channel of a mono
            file, None keeps all channels.
        duration_seconds: Duration to read, or less if the file ends earlier; None reads to the end of the file.
        source: Open binary file with the encoded audio, for which `path` is only a name in messages.

    Returns:
        `wave [c, n]` float32 and its sample rate (Hz).
    """
    path = Path(path)
    if sample_hz is not None:
        check_rate(sample_hz)
    check_channels(channels)
    if start_seconds < 0 or (duration_seconds is not None and duration_seconds <= 0):
        raise ValueError(
            f"{path}: start_seconds must be >= 0 and duration_seconds > 0, got {start_seconds} and {duration_seconds}"
        )
    with open_sound(path, source) as file:
        from_hz, to_hz = file.samplerate, sample_hz or file.samplerate
        check_decoded(path, file, file.frames)
        total = resampled_length(file.frames, from_hz, to_hz)
        start = round(min(start_seconds * to_hz, total))
        if start >= total:
            raise ValueError(
                f"{path}: start_seconds={start_seconds} must be less than the {file.frames / from_hz:.3f} s of the file"
            )
        count = total - start
        if duration_seconds is not None:
            count = round(min(duration_seconds * to_hz, count))
        if count < 1:
            raise ValueError(
                f"{path}: duration_seconds={duration_seconds} must be at least one sample, {1 / to_hz:.3g} s"
            )
        first, last, skip = resample_source_span(start, count, from_hz, to_hz)
        file.seek(first)
        # Channels are mixed block by block, because all channels of a long file would need several times the memory.
        blocks = [
            with_channels(torch.from_numpy(np.ascontiguousarray(block.T)), channels, f"{path}: the file")
            for block in sound_blocks(path, file, min(last, file.frames) - first)
        ]
    if not blocks:
        raise ValueError(
            f"{path}: the file is damaged; its header contains a longer duration, but no samples can be decoded at "
            f"{start_seconds} s"
        )
    wave = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    part = resample(wave, from_hz, to_hz)[:, skip : skip + count]
    if not part.shape[1]:
        raise ValueError(f"{path}: the file is damaged; it ends before {start_seconds} s, and its header is wrong")
    return part, to_hz


@typed
def write_audio(path: str | Path, wave: Tensor, sample_hz: int, comment: str = "") -> None:
    """Write `wave [n]` or `[c, n]` to an audio file; the file appears at `path` only when it is complete.

    Args:
        path: File name ending in .wav (16-bit), .flac (16-bit), .ogg (Vorbis) or .mp3; missing folders are created.
        wave: Float samples in -1..1; samples outside this range are clipped, unless `peak_safe` scales the wave first.
        comment: Text in the comment field of the file, see `AudioWriter`.
    """
    if wave.ndim not in (1, 2) or wave.numel() == 0:
        raise ValueError(f"{path}: wave must be [n] or [c, n] with at least one sample, got shape {tuple(wave.shape)}")
    rows = rearrange(wave, "n -> 1 n") if wave.ndim == 1 else wave
    with AudioWriter(path, sample_hz, channels=len(rows), comment=comment) as writer:
        writer.write(rows)


@typed
def peak_safe(wave: Tensor, ceiling: float = 0.99) -> Tensor:
    """Scale down a float wave of any shape, so that its peak is at most `ceiling`.

    A wave that contains NaN or infinite samples is returned as it is.
    """
    check_dtype(wave)
    if not 0 < ceiling < float("inf"):
        raise ValueError(f"ceiling must be finite and above 0, got {ceiling}")
    peak = wave.detach().abs().amax() if wave.numel() else wave.new_zeros(())
    return wave * (ceiling / peak) if ceiling < peak < float("inf") else wave
