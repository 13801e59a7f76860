"""Effects of recordings: reverb, low quality and the noise of a vinyl record."""

import numpy as np

from musiclm_pytorch.recipes.corpus.samples import hiss

__all__ = ["EFFECTS", "add_effect"]

EFFECTS = ("reverb", "low quality", "vinyl")

_REVERB_SECONDS, _REVERB_SHARE = 1.8, 0.5
# A recording of low quality has only these frequencies, and noise at -32 dB below the peak.
_LOW_QUALITY_BAND_HZ = (250.0, 3200.0)
_LOW_QUALITY_NOISE = 0.012
_VINYL_LEVEL = 0.06


def _reverb(wave: np.ndarray, sample_hz: int, rng: np.random.Generator) -> np.ndarray:
    """Add decaying echoes; the energy of the echoes is the share `_REVERB_SHARE` of the energy of the wave."""
    length = round(_REVERB_SECONDS * sample_hz)
    # The level falls by 60 dB (a factor of 1,000) in the length of the reverb.
    response = rng.standard_normal(length) * np.exp(-np.log(1000.0) * np.arange(length) / length)
    spectrum = np.fft.rfft(wave, len(wave) + length) * np.fft.rfft(response, len(wave) + length)
    # High frequencies decay faster in a room.
    spectrum /= 1 + np.linspace(0.0, 6.0, len(spectrum))
    echoes = np.fft.irfft(spectrum)[: len(wave)]
    scale = np.sqrt(_REVERB_SHARE * np.square(wave).sum() / max(np.square(echoes).sum(), 1e-12))
    return wave + scale * echoes


def _low_quality(wave: np.ndarray, sample_hz: int, rng: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(wave)
    hz = np.fft.rfftfreq(len(wave), 1 / sample_hz)
    low, high = _LOW_QUALITY_BAND_HZ
    spectrum /= np.sqrt((1 + (low / np.maximum(hz, 1.0)) ** 4) * (1 + (hz / high) ** 8))
    narrow = np.fft.irfft(spectrum, len(wave))
    return narrow + _LOW_QUALITY_NOISE * np.abs(narrow).max() * rng.standard_normal(len(wave))


def add_effect(wave: np.ndarray, effect: str | None, sample_hz: int, seed: int) -> np.ndarray:
    """Add an effect in `EFFECTS` to a mono wave with a largest absolute value of about 1; None = no effect."""
    rng = np.random.default_rng(seed)
    if effect == "reverb":
        wave = _reverb(wave, sample_hz, rng)
    elif effect == "low quality":
        wave = _low_quality(wave, sample_hz, rng)
    elif effect == "vinyl":
        wave = wave + _VINYL_LEVEL * hiss(len(wave), sample_hz, float(rng.random()))
    return wave.astype(np.float32)
