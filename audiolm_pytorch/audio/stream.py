"""Read, resample and write audio files in chunks, with memory that does not grow with the length of the files."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile
import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.formats import MAX_MP3_CHANNELS, MP3_RATES_HZ, WRITE_SUBTYPES, unreadable_reason
from audiolm_pytorch.audio.resample import StreamingResampler, resampled_length
from audiolm_pytorch.audio.waves import check_channels, check_rate, check_samples, with_channels
from audiolm_pytorch.checks.types import typed

__all__ = [
    "AudioInfo",
    "AudioSource",
    "AudioWriter",
    "check_decoded",
    "open_sound",
    "partial_path",
    "sound_blocks",
]

_HEAD_BYTES = 4096
_SYSTEM_ERROR = 2  # SF_ERR_SYSTEM of libsndfile
_BLOCK_FRAMES = 2**16
_MAX_COMMENT_BYTES = 2000  # libsndfile drops a longer comment of a WAV file
_MAX_STEM_BYTES = 200
_MAX_VALUES_PER_BLOCK = 8 * _BLOCK_FRAMES


@dataclass(frozen=True)
class AudioInfo:
    """Sample rate, length (samples per channel) and number of channels of an audio file."""

    sample_hz: int
    num_samples: int
    channels: int


class _SoundFile(soundfile.SoundFile):
    def seekable(self) -> bool:
        """Whether `read` may seek to the end of what it has read.

        The decoder of MP3 files would then decode frames without the earlier data that they need, and print errors.
        """
        return self.format != "MP3" and super().seekable()


@contextmanager
def open_sound(path: Path, source: io.IOBase | None = None) -> Iterator[soundfile.SoundFile]:
    """Open an audio file for a `with` statement; errors of libsndfile become ValueErrors that name the path.

    With an open binary file `source`, `path` is only its name in messages.
    """
    if source is None and not path.is_file():
        if path.exists():
            reason = "is a folder, not a file" if path.is_dir() else "is not a regular file"
        else:
            reason = "points to a missing file" if path.is_symlink() else "no such file"
        raise ValueError(f"{path}: {reason}")
    num_bytes = path.stat().st_size if source is None else source.seek(0, os.SEEK_END)
    if num_bytes == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    if source is not None:
        source.seek(0)
    try:
        # Bytes, because a file name may have characters that are not UTF-8.
        with _SoundFile(os.fsencode(path) if source is None else source) as file:
            check_rate(file.samplerate, f"{path}: the sample rate of the file")
            yield file
    except soundfile.LibsndfileError as error:
        with path.open("rb") if source is None else nullcontext(source) as opened:
            opened.seek(0)
            reason = unreadable_reason(opened.read(_HEAD_BYTES), num_bytes, error.error_string)
        raise ValueError(f"{path}: cannot be read as audio ({reason})") from error


def sound_blocks(path: Path, file: soundfile.SoundFile, num_frames: int) -> Iterator[np.ndarray]:
    """Read up to `num_frames` samples per channel from the current position, in checked float32 blocks `[n, c]`.

    Blocks are used because a single long read would stop at the first undecodable position of a damaged file.
    `SoundFile.blocks` is not used, because it repeats old samples if the length in the file header is too large.
    """
    block_frames = max(1, min(_BLOCK_FRAMES, _MAX_VALUES_PER_BLOCK // file.channels))
    while num_frames > 0 and len(block := file.read(min(num_frames, block_frames), dtype="float32", always_2d=True)):
        num_frames -= len(block)
        check_samples(torch.from_numpy(block), f"{path}: the file")
        yield block


def check_decoded(path: Path, file: soundfile.SoundFile, num_samples: int) -> None:
    """Raise a ValueError if a file, of which `num_samples` samples were decoded, is empty or damaged."""
    if num_samples == 0:
        raise ValueError(f"{path}: the file contains no samples")
    # The header of an MP3 without an index (Xing header) only estimates the length; other formats store it.
    if num_samples < file.frames and file.format != "MP3":
        raise ValueError(f"{path}: the file is damaged; only {num_samples} of {file.frames} samples can be decoded")


class AudioSource:
    """Audio file that yields float32 blocks `[c, n]`; the concatenated blocks equal the wave of `read_audio`.

    The attribute `info` contains the values in the file header. After a complete iteration, `info.num_samples` is the
    number of decoded samples, and the attribute `num_samples` is the total length of the blocks.

    Args:
        sample_hz: Sample rate of the blocks (Hz); None keeps the rate of the file.
        channels: Number of channels of the blocks; 1 averages all channels, a larger number repeats the channel of a
            mono file, None keeps all channels.
    """

    @typed
    def __init__(self, path: str | Path, sample_hz: int | None = None, channels: int | None = 1) -> None:
        self.path = Path(path)
        if sample_hz is not None:
            check_rate(sample_hz)
        check_channels(channels)
        with open_sound(self.path) as file:
            self.info = AudioInfo(sample_hz=file.samplerate, num_samples=file.frames, channels=file.channels)
        self.sample_hz, self.channels = sample_hz or self.info.sample_hz, channels or self.info.channels
        self.num_samples = resampled_length(self.info.num_samples, self.info.sample_hz, self.sample_hz)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the blocks of the audio file, each with at least one sample."""
        resampler = StreamingResampler(self.info.sample_hz, self.sample_hz, self.channels)
        num_samples = 0
        with open_sound(self.path) as file:
            for block in sound_blocks(self.path, file, file.frames):
                num_samples += len(block)
                wave = torch.from_numpy(np.ascontiguousarray(block.T))
                chunk = resampler.push(with_channels(wave, self.channels, f"{self.path}: the file"))
                if chunk.shape[-1]:
                    yield chunk
            check_decoded(self.path, file, num_samples)
        self.info = replace(self.info, num_samples=num_samples)
        chunk = resampler.finish()
        self.num_samples = resampler.num_returned
        if chunk.shape[-1]:
            yield chunk


def partial_path(path: Path) -> Path:
    """Return the path of the incomplete file that replaces `path` when it is complete."""
    stem = os.fsdecode(os.fsencode(path.stem)[:_MAX_STEM_BYTES])  # names may have at most 255 bytes
    return path.with_name(f".{stem}.{os.getpid()}.partial{path.suffix.lower()}")


class AudioWriter:
    """Writer of an audio file in chunks; the file appears at `path` only when it is complete.

    The first chunk creates the file and missing folders. If `path` is a link, its target is written. An error in the
    `with` block leaves no partial file. Example:

        with AudioWriter("music.wav", sample_hz=16000, channels=1) as writer:
            writer.write(wave)

    Args:
        path: File name ending in .wav (16-bit), .flac (16-bit), .ogg (Vorbis) or .mp3.
        comment: Text in the comment field of the file, which players show and `soundfile` reads; only the first 2,000
            bytes are stored. Surrogates, as in file names that are not UTF-8, are written as escapes, in .mp3 all
            letters that are not ASCII.
    """

    @typed
    def __init__(self, path: str | Path, sample_hz: int, channels: int, comment: str = "") -> None:
        self.path, self.sample_hz, self.channels, self.comment = Path(path), sample_hz, channels, comment
        suffix = self.path.suffix.lower()
        if suffix not in WRITE_SUBTYPES:
            raise ValueError(
                f"{path}: cannot write {suffix or 'a file without a suffix'}; use one of {', '.join(WRITE_SUBTYPES)}"
            )
        if "\0" in str(path):
            raise ValueError(f"{str(path)!r}: a file name cannot contain the character NUL; remove it")
        check_rate(sample_hz)
        check_channels(channels)
        self._subtype, self._is_mp3 = WRITE_SUBTYPES[suffix], suffix == ".mp3"
        if self._is_mp3 and (sample_hz not in MP3_RATES_HZ or channels > MAX_MP3_CHANNELS):
            raise ValueError(
                f"{path}: an MP3 file has 1 or 2 channels at {', '.join(map(str, MP3_RATES_HZ))} Hz, got {channels} at "
                f"{sample_hz} Hz; write .wav or .flac, or resample first"
            )
        self._target = self.path.resolve() if self.path.is_symlink() else self.path
        self._partial = partial_path(self._target)
        self._file: soundfile.SoundFile | None = None
        self._num_samples = 0
        self._is_closed = False

    def __enter__(self) -> "AudioWriter":
        return self

    @typed
    def write(self, wave: Tensor) -> None:
        """Append `wave [c, n]` to the file; samples outside -1..1 are clipped."""
        if wave.ndim != 2 or len(wave) != self.channels:
            raise ValueError(f"{self.path}: wave must be [{self.channels}, n], got shape {list(wave.shape)}")
        if self._is_closed:
            raise ValueError(f"{self.path}: the file is complete; call write inside the `with` block")
        check_samples(wave, f"{self.path}: wave")
        columns = rearrange(wave.detach().to("cpu", torch.float32).numpy(), "c n -> n c")
        with self._errors():
            if self._file is None:
                self._target.parent.mkdir(parents=True, exist_ok=True)
                # libsndfile would report neither a name that is too long nor a missing permission.
                with suppress(FileNotFoundError):
                    self.path.lstat()
                self._partial.touch()
                self._file = soundfile.SoundFile(
                    os.fsencode(self._partial),
                    "w",
                    samplerate=self.sample_hz,
                    channels=self.channels,
                    subtype=self._subtype,
                )
                if self.comment:
                    encoding = "ascii" if self._is_mp3 else "utf-8"
                    comment = self.comment.encode(encoding, errors="backslashreplace")[:_MAX_COMMENT_BYTES]
                    self._file.comment = comment.decode(errors="ignore")
            # The Vorbis encoder of libsndfile stores the samples of one call on the stack, which a long call would
            # overflow.
            for begin in range(0, len(columns), _BLOCK_FRAMES):
                self._file.write(columns[begin : begin + _BLOCK_FRAMES])
        self._num_samples += len(columns)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closed = True
        try:
            with self._errors():
                if self._file is not None:
                    self._file.close()
            if kind is None:
                if self._file is None:
                    raise ValueError(f"{self.path}: no samples were written; call write inside the `with` block")
                self._check_complete()
                with self._errors():
                    os.replace(self._partial, self._target)
        finally:
            with suppress(OSError):
                self._partial.unlink()

    def _check_complete(self) -> None:
        """Decode a compressed file, because libsndfile reports no error if the disk is full when the file is closed."""
        if self.path.suffix.lower() == ".wav":
            return
        try:
            with open_sound(self._partial) as file:
                num_samples = sum(map(len, sound_blocks(self._partial, file, self._num_samples)))
        except ValueError as error:
            raise self._disk_error("the written file cannot be decoded") from error
        if num_samples != self._num_samples:
            raise self._disk_error(f"only {num_samples} of {self._num_samples} samples were written")

    def _disk_error(self, reason: str) -> OSError:
        return OSError(f"{self.path}: the file cannot be written ({reason}); check the free space of the disk")

    def _is_disk_full(self) -> bool:
        """Whether a block cannot be written: libsndfile reports other errors if the disk has no room for a header."""
        try:
            with self._partial.open("ab") as file:
                file.write(bytes(2**12))
        except OSError:
            return True
        return False

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of libsndfile into errors that name the path: OSErrors of the disk, else ValueErrors."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{self.path}: the file cannot be written ({error.strerror})") from error
        except soundfile.LibsndfileError as error:
            if error.code == _SYSTEM_ERROR or self._is_disk_full():
                raise self._disk_error("the system refused a write") from error
            shape = f"{self.channels} channels at {self.sample_hz} Hz"
            raise ValueError(f"{self.path}: the file cannot be written ({shape}: {error.error_string})") from error
