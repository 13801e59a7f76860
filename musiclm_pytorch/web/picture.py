"""The picture of a sound on the page: its waveform above its spectrogram, both as wide as the sound is long."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audio.mel import MelSpectrogram

__all__ = ["write_picture"]

_WIDTH, _WAVE_HEIGHT, _MEL_HEIGHT, _GAP = 1200, 150, 210, 12
_WAVE_COLOUR = (99, 102, 241, 255)
# Colours of the spectrogram from silence to its loudest point.
_COLOURS = np.array([(15, 16, 40), (64, 30, 110), (150, 44, 120), (226, 80, 90), (252, 160, 80), (252, 250, 200)])
_RANGE_DB = 70.0


def write_picture(path: Path, wave: Tensor, sample_hz: int) -> None:
    """Write the picture of a wave `[n]` in -1..1 as a PNG file with a transparent background."""
    from PIL import Image

    picture = Image.new("RGBA", (_WIDTH, _WAVE_HEIGHT + _GAP + _MEL_HEIGHT))
    picture.paste(Image.fromarray(_waveform(wave)))
    mel = MelSpectrogram(sample_hz=sample_hz, n_fft=1024, hop_length=256, num_mels=96, f_min_hz=40.0)(wave)
    decibel = 20 * mel.clamp(min=1e-5).log10()
    share = ((decibel - decibel.max()) / _RANGE_DB + 1).clamp(0, 1).flip(0).numpy()
    grid = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(share, grid, channel) for channel in _COLOURS.T], axis=-1).astype(np.uint8)
    spectrogram = Image.fromarray(colours).resize((_WIDTH, _MEL_HEIGHT), Image.Resampling.BILINEAR)
    picture.paste(spectrogram, (0, _WAVE_HEIGHT + _GAP))
    picture.save(path, optimize=True)


def _waveform(wave: Tensor) -> np.ndarray:
    """Draw the lowest and the highest sample of every column as pixels `[height, width, 4]`."""
    edges = torch.linspace(0, wave.shape[-1], _WIDTH + 1).long().tolist()
    parts = [wave[start : max(stop, start + 1)] for start, stop in zip(edges, edges[1:])]
    low, high = (torch.stack([limit(part) for part in parts]).numpy() for limit in (torch.amin, torch.amax))
    rows = np.linspace(1, -1, _WAVE_HEIGHT)[:, None]
    pixel = 2 / _WAVE_HEIGHT
    pixels = np.zeros((_WAVE_HEIGHT, _WIDTH, 4), dtype=np.uint8)
    pixels[(rows >= low - pixel) & (rows <= high + pixel)] = _WAVE_COLOUR
    return pixels
