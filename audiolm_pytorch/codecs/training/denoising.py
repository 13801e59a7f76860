"""Mixtures of clean audio with recorded noise, for a codec that can denoise (SoundStream, arXiv 2107.03312, III-F)."""

from dataclasses import dataclass

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.data.crops import CropDataset

__all__ = ["Mixture", "NoiseMixer"]

_SILENCE = 1e-5  # root mean square, -100 dB of full scale: below it a ratio to noise means nothing
_DRAWS = 4


@dataclass(frozen=True, eq=False)
class Mixture:
    """One item to train or to validate on.

    Attributes:
        wave: What goes in, `[n]` or `[c, n]`.
        target: What has to come out.
        denoise: Whether the codec is told to denoise.
        clean: The wave without noise, at the level that it has in the mixture.
        snr_db: Of clean to noise; infinite where nothing was added.
    """

    wave: Tensor
    target: Tensor
    denoise: bool
    clean: Tensor
    snr_db: float


class NoiseMixer:
    """Adds a random stretch of a random noise recording to each clean crop, at a random level.

    An item whose flag says "denoise" has the clean wave as target, any other the mixture itself, so that one codec
    learns both (SoundStream, section III-F). Everything is a pure function of the seed, the epoch and the index.

    Args:
        clean: Crops of clean audio.
        noise: Crops of noise at the same rate; shorter ones are repeated.
        sample_hz: That rate (Hz).
        snr_db: Lowest and highest ratio of clean to noise (dB), drawn uniformly.
        denoise_share: Share of the items whose flag is set.
        clean_share: Share of the items without noise: audio that is clean already must come out as it is, with the flag
            or without.
        seed: Of all draws, not negative.

    Raises:
        ValueError: If a number is out of range, or a data set is not at the rate.
    """

    @beartype
    def __init__(
        self,
        clean: CropDataset,
        noise: CropDataset,
        *,
        sample_hz: int,
        snr_db: tuple[float | int, float | int] = (0.0, 15.0),
        denoise_share: float = 0.5,
        clean_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not snr_db[0] <= snr_db[1] or not 0 <= denoise_share <= 1 or not 0 <= clean_share <= 1 or seed < 0:
            raise ValueError(
                "need snr_db = (lowest, highest), shares from 0 to 1 and seed >= 0, got "
                f"{snr_db}, {denoise_share}, {clean_share}, {seed}"
            )
        for name, crops in (("clean", clean), ("noise", noise)):
            if sample_hz not in crops.rates_hz:
                raise ValueError(f"the {name} crops are at {crops.rates_hz} Hz, {sample_hz} Hz are needed")
        self.clean, self.noise, self.sample_hz = clean, noise, sample_hz
        self.snr_db, self.denoise_share, self.clean_share, self.seed = snr_db, denoise_share, clean_share, seed

    def __len__(self) -> int:
        """Count the clean files."""
        return len(self.clean)

    @beartype
    def get(self, epoch: int, index: int) -> Mixture:
        """Mix one item.

        Args:
            epoch: Pass over the clean data, from 0.
            index: Of the clean file.

        Returns:
            The mixture; silent audio, and audio for which no noise is found but silence, is left as it is.
        """
        draws = np.random.default_rng([self.seed, 1, epoch, index])
        denoise = bool(draws.random() < self.denoise_share)
        is_clean = bool(draws.random() < self.clean_share)
        snr_db = float(draws.uniform(*self.snr_db))
        clean = self.clean.get(epoch, index).waves[self.sample_hz]
        noise = None if is_clean or _level(clean) < _SILENCE else self._noise(draws, clean)
        if noise is None:
            return Mixture(clean, clean, denoise, clean, float("inf"))
        mixture = clean + noise * (_level(clean) / _level(noise) * 10 ** (-snr_db / 20))
        # Codecs are made for -1..1: mixture and target keep their ratio.
        scale = 1.0 / max(1.0, float(mixture.abs().max()))
        mixture, clean = mixture * scale, clean * scale
        return Mixture(mixture, clean if denoise else mixture, denoise, clean, snr_db)

    def _noise(self, draws: np.random.Generator, clean: Tensor) -> Tensor | None:
        """Noise of the shape of a clean wave; None where a few draws give nothing but silence."""
        for _ in range(_DRAWS):
            # The epoch of a crop only says where it lies.
            crop = self.noise.get(int(draws.integers(2**31)), int(draws.integers(len(self.noise))))
            wave = crop.waves[self.sample_hz]
            length = clean.shape[-1]
            wave = torch.cat([wave] * -(-length // wave.shape[-1]), dim=-1)[..., :length]
            if _level(wave) >= _SILENCE:
                return wave
        return None


def _level(wave: Tensor) -> float:
    """Root mean square of a wave."""
    return float(wave.double().square().mean().sqrt())
