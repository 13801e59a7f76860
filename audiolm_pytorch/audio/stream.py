"""Sound files of any length, block by block: read, resampled and written in little memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from beartype import beartype
from einops import rearrange, reduce
from torch import Tensor

__all__ = [
    "WRITABLE_SUFFIXES",
    "AudioInfo",
    "AudioSource",
    "AudioWriter",
    "StreamingResampler",
    "open_sound",
    "refuse_non_finite",
    "resampled_length",
    "sound_blocks",
    "with_channels",
]

BLOCK_FRAMES = 2**16
SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS"}
WRITABLE_SUFFIXES = tuple(SUBTYPES)
RESAMPLER_QUALITY = "HQ"


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file holds: its rate, its length in samples per channel, and its channels."""

    sample_hz: int
    num_samples: int
    channels: int


@contextmanager
def open_sound(path: Path) -> Iterator[soundfile.SoundFile]:
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


def sound_blocks(file: soundfile.SoundFile, num_frames: int) -> Iterator[np.ndarray]:
    """Read up to `num_frames` from where the file stands, in blocks `[n, c]` float32.

    One long read stops at the first hole of a damaged file, and soundfile's own `blocks` repeats old samples where a
    file ends before its header says: this does neither.
    """
    while num_frames > 0 and len(block := file.read(min(num_frames, BLOCK_FRAMES), dtype="float32", always_2d=True)):
        num_frames -= len(block)
        yield block


def refuse_non_finite(samples: np.ndarray, path: Path) -> None:
    """Raise a ValueError that names the file if a sample is NaN or infinite."""
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")


def with_channels(wave: np.ndarray, channels: int | None, path: Path) -> np.ndarray:
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


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Length after resampling: the last instant that any input sample stands for is still covered."""
    return -(-num_samples * to_hz // from_hz)


class StreamingResampler:
    """Resample a wave that arrives in pieces; the concatenated output equals `audio.resample` of the whole wave.

    Args:
        from_hz: Rate of the pieces (Hz).
        to_hz: Rate wanted (Hz).
        channels: Channels of every piece.
    """

    @beartype
    def __init__(self, from_hz: int, to_hz: int, channels: int) -> None:
        self.from_hz, self.to_hz, self.channels = from_hz, to_hz, channels
        self.num_taken = self.num_given = 0
        self._stream: Any = None
        if from_hz != to_hz:
            self._stream = soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32", quality=RESAMPLER_QUALITY)

    def push(self, wave: Tensor) -> Tensor:
        """Take a piece `[c, n]` and give what is ready, `[c, m]` (m may be 0)."""
        self.num_taken += wave.shape[-1]
        return self._given(wave if self._stream is None else self._resampled(wave))

    def finish(self) -> Tensor:
        """Give the rest, so that there are `resampled_length` samples in all; nothing can be pushed afterwards."""
        wanted = resampled_length(self.num_taken, self.from_hz, self.to_hz) - self.num_given
        if self._stream is None or wanted <= 0:
            return torch.zeros(self.channels, 0)
        # zeros behind the end (which soxr assumes there anyway), since it rounds the length where we want the ceiling
        tail = torch.zeros(self.channels, self.from_hz // self.to_hz + 2)
        return self._given(self._resampled(tail, last=True)[:, :wanted])

    def _resampled(self, wave: Tensor, last: bool = False) -> Tensor:
        columns = np.ascontiguousarray(rearrange(wave.numpy(), "c n -> n c"))
        made = self._stream.resample_chunk(columns, last=last)
        return torch.from_numpy(np.ascontiguousarray(rearrange(made, "n c -> c n")))

    def _given(self, wave: Tensor) -> Tensor:
        self.num_given += wave.shape[-1]
        return wave


class AudioSource:
    """A sound file as a sequence of blocks `[c, n]` float32 at a given rate; joined they are what `read_audio` gives.

    After it has been gone through once, `info` says what the file really held, and `num_samples` is the length of the
    blocks together.

    Args:
        path: An audio file.
        sample_hz: Rate wanted (Hz); None keeps the file's own.
        channels: 1 averages all channels, None keeps them; another number must be the file's own (mono is repeated).

    Raises:
        ValueError: If the file cannot be read; while iterating if it is damaged, empty, or holds NaN.
    """

    @beartype
    def __init__(self, path: str | Path, sample_hz: int | None = None, channels: int | None = 1) -> None:
        self.path = Path(path)
        with open_sound(self.path) as file:
            self.info = AudioInfo(sample_hz=file.samplerate, num_samples=file.frames, channels=file.channels)
        self.sample_hz, self.channels = sample_hz or self.info.sample_hz, channels or self.info.channels
        self.num_samples = resampled_length(self.info.num_samples, self.info.sample_hz, self.sample_hz)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the blocks, each with at least one sample."""
        info = self.info
        resampler = StreamingResampler(info.sample_hz, self.sample_hz, self.channels)
        num_samples = 0
        with open_sound(self.path) as file:
            for block in sound_blocks(file, file.frames):
                refuse_non_finite(block, self.path)
                num_samples += len(block)
                columns = with_channels(np.ascontiguousarray(block.T), self.channels, self.path)
                piece = resampler.push(torch.from_numpy(columns))
                if piece.shape[-1]:
                    yield piece
            if num_samples == 0:
                raise ValueError(f"{self.path}: the file holds no samples")
            # An MP3 without an index (Xing header) only guesses its length; every other format knows it.
            if num_samples < file.frames and file.format != "MP3":
                raise ValueError(
                    f"{self.path}: the file is damaged, {num_samples} of {file.frames} samples can be decoded"
                )
        self.info = AudioInfo(sample_hz=info.sample_hz, num_samples=num_samples, channels=info.channels)
        piece = resampler.finish()
        self.num_samples = resampler.num_given
        if piece.shape[-1]:
            yield piece


class AudioWriter:
    """A sound file that is written piece by piece and appears under its name only when it is complete.

        with AudioWriter("music.wav", sample_hz=16000, channels=1) as writer:
            writer.write(wave)

    The file and missing folders are made with the first piece; an error inside the block leaves nothing behind.

    Args:
        path: Name ending in .wav (16-bit), .flac (16-bit) or .ogg (Vorbis).
        sample_hz: Sample rate in Hz.
        channels: Channels of every piece.

    Raises:
        ValueError: If the suffix is none of these; later if a sample is not finite, the format refuses the rate or the
            channels, or nothing was written.
    """

    @beartype
    def __init__(self, path: str | Path, sample_hz: int, channels: int) -> None:
        self.path, self.sample_hz, self.channels = Path(path), sample_hz, channels
        suffix = self.path.suffix.lower()
        if suffix not in SUBTYPES:
            raise ValueError(
                f"{path}: cannot write {suffix or 'a name without suffix'}; use one of {', '.join(SUBTYPES)}"
            )
        self._subtype = SUBTYPES[suffix]
        self._partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial{suffix}")
        self._file: soundfile.SoundFile | None = None

    def __enter__(self) -> "AudioWriter":
        return self

    @beartype
    def write(self, wave: Tensor) -> None:
        """Append `wave [c, n]`; full scale is -1..1 and what lies beyond is clipped."""
        samples = wave.detach().to("cpu", torch.float32).numpy()
        refuse_non_finite(samples, self.path)
        columns = rearrange(samples, "c n -> n c")
        with self._errors():
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = soundfile.SoundFile(
                    self._partial, "w", samplerate=self.sample_hz, channels=self.channels, subtype=self._subtype
                )
            # In blocks: libsndfile's Vorbis encoder puts what one call brings on the stack, and long files overflow it.
            for begin in range(0, len(columns), BLOCK_FRAMES):
                self._file.write(columns[begin : begin + BLOCK_FRAMES])

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._errors():
                if self._file is not None:
                    self._file.close()
            if kind is None:
                if self._file is None:
                    raise ValueError(f"{self.path}: there are no samples to write")
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What libsndfile says becomes a ValueError that names the path."""
        try:
            yield
        except soundfile.LibsndfileError as error:
            shape = f"{self.channels} channels at {self.sample_hz} Hz"
            raise ValueError(f"{self.path}: cannot be written ({shape}: {error.error_string})") from error
