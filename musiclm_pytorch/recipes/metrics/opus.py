"""Encoding and decoding of audio with Opus, by the programs opusenc and opusdec (opus-tools)."""

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.checks.types import typed

__all__ = ["OpusCopy", "opus_copy", "require_opus"]

_PROGRAMS = ("opusenc", "opusdec")
_MIN_KBPS, _MAX_KBPS = 6, 256
_TIMEOUT_SECONDS = 600
_HEADER_PACKETS = 2


class OpusCopy(NamedTuple):
    """A decoded wave `[c, n]` that is aligned with the original, and the size of its Opus packets in bits."""

    wave: Tensor
    num_bits: int


def require_opus() -> None:
    """Check that the programs opusenc and opusdec are installed."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} are missing; install them with apt-get install opus-tools")


@typed
def opus_copy(wave: Tensor, sample_hz: int, kbps: float) -> OpusCopy:
    """Encode and decode a wave `[c, n]` in -1..1 with Opus (variable bitrate, highest complexity).

    `kbps` is the requested bitrate of all channels together. The decoded wave is aligned with the original wave,
    because opusdec removes the look-ahead of the encoder.
    """
    require_opus()
    if not _MIN_KBPS <= kbps <= _MAX_KBPS:
        raise ValueError(f"Opus supports {_MIN_KBPS} to {_MAX_KBPS} kbps, got {kbps:g} kbps")
    channels, num_samples = wave.shape
    with tempfile.TemporaryDirectory(prefix="opus-") as folder:
        original, packed, copy = (Path(folder) / name for name in ("in.wav", "packed.opus", "out.wav"))
        columns = rearrange(wave.detach().float().cpu(), "c n -> n c").numpy()
        soundfile.write(original, columns, sample_hz, subtype="FLOAT")
        _run("opusenc", "--quiet", "--bitrate", f"{kbps:g}", str(original), str(packed))
        _run("opusdec", "--quiet", "--float", "--rate", str(sample_hz), str(packed), str(copy))
        samples = soundfile.read(copy, dtype="float32", always_2d=True)[0]
        num_bits = 8 * _audio_bytes(packed.read_bytes())
    decoded = torch.from_numpy(np.ascontiguousarray(samples.T))[:channels, :num_samples]
    return OpusCopy(F.pad(decoded, (0, num_samples - decoded.shape[-1])), num_bits)


def _run(*words: str) -> None:
    """Run a program, and raise a ValueError with the error output if the program fails."""
    program = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if program.returncode:
        raise ValueError(f"the program {words[0]} failed: {' '.join(program.stderr.split()) or program.returncode}")


def _audio_bytes(packed: bytes) -> int:
    """Sum the sizes of the packets of an Ogg file, except the two header packets (RFC 3533, section 6)."""
    sizes, size, position = [], 0, 0
    while position < len(packed):
        (num_segments,) = struct.unpack_from("B", packed, position + 26)
        lacing = packed[position + 27 : position + 27 + num_segments]
        for value in lacing:
            size += value
            if value < 255:
                sizes.append(size)
                size = 0
        position += 27 + num_segments + sum(lacing)
    return sum(sizes[_HEADER_PACKETS:])
