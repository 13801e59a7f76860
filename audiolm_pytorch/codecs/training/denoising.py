"""Mixtures of clean audio and recorded noise that train a codec to denoise (SoundStream, arXiv 2107.03312, III-F)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.crops import CropDataset

__all__ = ["Mixture", "NoiseMixer"]

_SILENCE = 1e-5  # root mean square, -100 dB of full scale: below it a ratio to noise is not defined
_NOISE_DRAWS = 4
_DENOISE_SHARE = 0.5  # of the items whose `denoise` flag is set


@dataclass(frozen=True, eq=False)
class Mixture:
    """Training example of a denoising codec, with input and target `[n]` or `[c, n]` and the flag `denoise`.

    `clean` is the wave without noise, with the same gain as in the mixture. `snr_db` is infinite if no noise is added.
    """

    wave: Tensor
    target: Tensor
    denoise: bool
    clean: Tensor
    snr_db: float


class NoiseMixer:
    """Adds a random excerpt of a random noise recording to each clean crop, at a random level.

    The target is the clean wave if the `denoise` flag is set, else the mixture, so that one codec learns to keep and to
    remove noise (SoundStream, section III-F). Each training example depends only on the seed, the epoch and the index.

    Args:
        noise: Crops of noise; noise shorter than a clean crop is repeated.
        snr_db: Lowest and highest signal-to-noise ratio (dB); each item draws a ratio uniformly.
        clean_share: Share of the items (0 to 1) to which no noise is added.
    """

    @typed
    def __init__(
        self,
        clean: CropDataset,
        noise: CropDataset,
        *,
        sample_hz: int,
        snr_db: tuple[float, float] = (0.0, 15.0),
        clean_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not snr_db[0] <= snr_db[1] or not 0 <= clean_share <= 1 or seed < 0:
            raise ValueError(
                "need snr_db = (lowest, highest), clean_share from 0 to 1 and seed >= 0, got "
                f"{snr_db=}, {clean_share=} and {seed=}"
            )
        for name, crops in (("clean", clean), ("noise", noise)):
            if sample_hz not in crops.rates_hz:
                raise ValueError(f"the {name} crops are at {crops.rates_hz} Hz; pass crops at {sample_hz} Hz")
        self.clean, self.noise, self.sample_hz = clean, noise, sample_hz
        self.snr_db, self.clean_share, self.seed = snr_db, clean_share, seed

    @typed
    def get(self, epoch: int, index: int) -> Mixture:
        """Mix one clean crop with noise; add no noise if the clean crop, or all drawn noise, is silent."""
        rng = np.random.default_rng([self.seed, 1, epoch, index])
        denoise = bool(rng.random() < _DENOISE_SHARE)
        is_clean = bool(rng.random() < self.clean_share)
        snr_db = float(rng.uniform(*self.snr_db))
        clean = self.clean.get(epoch, index).waves[self.sample_hz]
        noise = None if is_clean or _level(clean) < _SILENCE else self._draw_noise(rng, clean.shape[-1])
        if noise is None:
            return Mixture(clean, clean, denoise, clean, float("inf"))
        mixture = clean + noise * (_level(clean) / _level(noise) * 10 ** (-snr_db / 20))
        # codecs expect -1..1; one factor keeps the ratio of mixture and target
        scale = 1.0 / max(1.0, float(mixture.abs().max()))
        mixture, clean = mixture * scale, clean * scale
        return Mixture(mixture, clean if denoise else mixture, denoise, clean, snr_db)

    def _draw_noise(self, rng: np.random.Generator, num_samples: int) -> Tensor | None:
        """Draw noise of `num_samples` samples; return None if several draws are all silent."""
        for _ in range(_NOISE_DRAWS):
            # each epoch has another position in the file
            crop = self.noise.get(int(rng.integers(2**31)), int(rng.integers(len(self.noise))))
            wave = crop.waves[self.sample_hz]
            wave = torch.cat([wave] * -(-num_samples // wave.shape[-1]), dim=-1)[..., :num_samples]
            if _level(wave) >= _SILENCE:
                return wave
        return None


def _level(wave: Tensor) -> float:
    """Return the root mean square of a wave, with numpy, whose sum does not depend on the number of threads."""
    return float(np.sqrt(np.mean(np.square(wave.numpy(), dtype=np.float64))))
