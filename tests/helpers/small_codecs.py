"""A small codec, and clips to train it on."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from audiolm_pytorch import SoundStream, SpectralSoundStream

RATE_HZ = 16000


def write_chords(folder: Path, seconds: float) -> Path:
    """Write four clips of chords with a decay."""
    time_seconds = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    for number in range(4):
        partials = sum(np.sin(2 * np.pi * 110 * (number + 2) * k * time_seconds) / k for k in (1, 2, 3))
        soundfile.write(folder / f"{number}.wav", 0.2 * partials * np.exp(-2 * time_seconds), RATE_HZ)
    return folder


def tiny_codec(**changes: object) -> SoundStream:
    """Build a spectral codec with 2 levels of 16 codes."""
    torch.manual_seed(0)
    sizes = dict(dim=16, encoder_depth=1, decoder_depth=1, codebook_size=16, rq_num_quantizers=2, code_dim=8)
    return SpectralSoundStream(**{**sizes, **changes})
