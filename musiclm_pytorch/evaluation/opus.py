"""Opus at a given bitrate, through opusenc and opusdec (opus-tools): the yardstick that everybody knows."""

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.resample import resample
from musiclm_pytorch.evaluation.codec_report import CodecRow, distance_row

__all__ = ["OpusCopy", "check_bitrate", "opus_copy", "opus_row", "require_opus"]

_PROGRAMS = ("opusenc", "opusdec")
_LEAST_KBPS, _MOST_KBPS = 6, 256
_TIMEOUT_SECONDS = 600
_HEADER_PACKETS = 2


class OpusCopy(NamedTuple):
    """What Opus makes of a wave.

    Attributes:
        wave: `[c, n]`, as long as the original and in step with it.
        num_bits: Bits of the audio packets, without headers and container.
    """

    wave: Tensor
    num_bits: int


def require_opus() -> None:
    """Refuse to go on without the programs.

    Raises:
        ValueError: If one is missing; says how to install it.
    """
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not found; install with: apt-get install opus-tools")


def check_bitrate(kbps: float) -> None:
    """Refuse a bitrate that Opus does not have."""
    if not _LEAST_KBPS <= kbps <= _MOST_KBPS:
        raise ValueError(f"Opus takes {_LEAST_KBPS} to {_MOST_KBPS} kbps, got {kbps:g}")


@beartype
def opus_copy(wave: Tensor, sample_hz: int, kbps: float | int) -> OpusCopy:
    """Encode and decode a wave with Opus in its usual mode (variable bitrate, highest complexity).

    opusdec skips what the encoder's look-ahead adds and cuts the end, so that the copy is in step.

    Args:
        wave: `[c, n]` in -1..1.
        sample_hz: Its rate (Hz); the copy has it too.
        kbps: Bitrate wanted, of all channels together.

    Returns:
        The copy.

    Raises:
        ValueError: If the programs are missing or refuse.
    """
    require_opus()
    check_bitrate(kbps)
    channels, num_samples = wave.shape
    with tempfile.TemporaryDirectory(prefix="opus-") as folder:
        original, packed, copy = (Path(folder) / name for name in ("in.wav", "packed.opus", "out.wav"))
        columns = rearrange(wave.detach().float().cpu(), "c n -> n c").numpy()
        soundfile.write(original, columns, sample_hz, subtype="FLOAT")
        _run("opusenc", "--quiet", "--bitrate", f"{kbps:g}", str(original), str(packed))
        _run("opusdec", "--quiet", "--float", "--rate", str(sample_hz), str(packed), str(copy))
        made = soundfile.read(copy, dtype="float32", always_2d=True)[0]
        num_bits = 8 * _audio_bytes(packed.read_bytes())
    decoded = torch.from_numpy(np.ascontiguousarray(made.T))[:channels, :num_samples]
    return OpusCopy(F.pad(decoded, (0, num_samples - decoded.shape[-1])), num_bits)


@beartype
def opus_row(clips: Iterable[tuple[Tensor, int]], kbps: float | int, sample_hz: int) -> CodecRow:
    """Measure Opus as a codec is measured.

    Args:
        clips: Waves `[c, n]` with their rates (Hz), at which Opus gets them; gone through once.
        kbps: Bitrate wanted.
        sample_hz: Rate at which copy and original are compared (Hz).

    Returns:
        The row, with the bitrate that Opus really took.
    """
    num_bits = 0

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal num_bits
        for wave, from_hz in clips:
            copy = opus_copy(wave, from_hz, kbps)
            num_bits += copy.num_bits
            yield resample(copy.wave, from_hz, sample_hz), resample(wave, from_hz, sample_hz)

    row = distance_row(f"opus {kbps:g} kbps", pairs(), sample_hz)
    return replace(row, kbps=num_bits / row.seconds / 1000)


def _run(*words: str) -> None:
    """Run a program; what it says when it fails becomes a ValueError."""
    ended = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if ended.returncode:
        raise ValueError(f"{words[0]} failed: {' '.join(ended.stderr.split()) or ended.returncode}")


def _audio_bytes(packed: bytes) -> int:
    """Sum the packets of an Ogg stream behind its two headers (RFC 3533, section 6: pages and their lacing values)."""
    sizes, size, place = [], 0, 0
    while place < len(packed):
        (num_segments,) = struct.unpack_from("B", packed, place + 26)
        lacing = packed[place + 27 : place + 27 + num_segments]
        for value in lacing:
            size += value
            if value < 255:
                sizes.append(size)
                size = 0
        place += 27 + num_segments + sum(lacing)
    return sum(sizes[_HEADER_PACKETS:])
