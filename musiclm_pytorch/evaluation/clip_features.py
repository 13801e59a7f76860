"""Features of music clips, computed from the log-mel spectrogram and from the rhythm of note onsets."""

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.checks.types import typed

__all__ = ["ClipFeatures", "FeatureModule"]

# Windows of 64 ms every 10 ms are long enough to separate neighbouring low notes, and short enough for onsets.
FFT_SECONDS = 0.064
FRAMES_PER_SECOND = 100
F_MIN_HZ, F_MAX_HZ = 40.0, 7600.0
SMOOTH_FRAMES = 5
QUANTILES = (0.1, 0.5, 0.9)
CHANGE_LAGS_FRAMES = (2, 8)
ONSET_LAG_FRAMES = 3
NUM_ONSET_BANDS = 4
# The pulse has lags of 0.08 to 2 s (30 to 750 beats per minute). Modulations are 0.4 to 16 Hz. Both are pooled by 4.
PULSE_LAGS_FRAMES = (8, 200)
RHYTHM_FFT_FRAMES = 1024
RHYTHM_BINS = (4, 164)
RHYTHM_POOL = 4
MIN_SECONDS = 2.5
CLIPS_PER_BATCH = 50


class FeatureModule(nn.Module):
    """Base class of modules that compute features `[b, d]` of waves `[b, n]` for a classifier."""

    config: dict[str, Any]
    sample_hz: int


class ClipFeatures(FeatureModule):
    """Module that computes about 1,000 features of a clip, which hardly depend on loudness, faint noise or a codec.

    Levels of the mel spectrogram are in bels relative to the loudest value. Levels more than `dynamic_range_db` below
    the loudest value are raised to this limit, so that inaudible sounds have little weight. The default of 30 dB makes
    classifiers more accurate on degraded clips than larger values; on clean clips the accuracy falls by at most 0.01.

    The features of a mel band are statistics of its level over time: mean, standard deviation, quantiles, mean change.
    The features of rhythm are the autocorrelation and the modulation spectrum of the onset strength (rectified change
    of level), in four frequency regions and in the whole spectrum.

    The `num_mels` bands, a multiple of 4, lie between 40 and 7600 Hz. Waves are resampled to `sample_hz`, and only the
    middle `window_seconds`, at most 5, of longer waves are used.
    """

    @typed
    def __init__(
        self,
        *,
        sample_hz: int = 16_000,
        num_mels: int = 64,
        dynamic_range_db: float = 30.0,
        window_seconds: float = 5.0,
    ) -> None:
        super().__init__()
        if sample_hz < 2 * F_MAX_HZ or num_mels % NUM_ONSET_BANDS or dynamic_range_db <= 0:
            raise ValueError(
                f"sample_hz must be at least {2 * F_MAX_HZ:.0f}, num_mels divisible by {NUM_ONSET_BANDS} and "
                f"dynamic_range_db positive, got {sample_hz=}, {num_mels=}, {dynamic_range_db=}"
            )
        if not MIN_SECONDS <= window_seconds <= 5.0:
            raise ValueError(f"window_seconds must be in {MIN_SECONDS}..5, got {window_seconds}")
        self.config = {
            "sample_hz": sample_hz,
            "num_mels": num_mels,
            "dynamic_range_db": float(dynamic_range_db),
            "window_seconds": float(window_seconds),
        }
        self.sample_hz = sample_hz
        self.dynamic_range_db = float(dynamic_range_db)
        self.window_samples = round(window_seconds * sample_hz)
        self.mel = MelSpectrogram(
            sample_hz=sample_hz,
            n_fft=round(FFT_SECONDS * sample_hz),
            hop_length=sample_hz // FRAMES_PER_SECOND,
            num_mels=num_mels,
            f_min_hz=F_MIN_HZ,
            f_max_hz=F_MAX_HZ,
            power=2.0,
        )

    @torch.no_grad()
    def forward(self, waves: Tensor, sample_hz: int | None = None) -> Tensor:
        """Compute features `[b, d]` (float32) of waves `[b, n]`, which must last at least 2.5 s.

        `sample_hz` is the sample rate of the waves; None means that waves have the sample rate of the module.
        """
        if waves.ndim != 2 or not torch.isfinite(waves).all():
            raise ValueError(f"waves must have the shape [b, n] and finite samples, got the shape {tuple(waves.shape)}")
        rows = [self._describe(part, sample_hz or self.sample_hz) for part in waves.split(CLIPS_PER_BATCH)]
        return torch.cat(rows)

    def _describe(self, waves: Tensor, sample_hz: int) -> Tensor:
        waves = resample(waves.float(), sample_hz, self.sample_hz)
        if waves.shape[-1] < MIN_SECONDS * self.sample_hz:
            raise ValueError(
                f"got clips of {waves.shape[-1] / self.sample_hz:.2f} s, features need at least {MIN_SECONDS} s; pass "
                "longer clips"
            )
        start = max(waves.shape[-1] - self.window_samples, 0) // 2
        levels = self.levels(waves[:, start : start + self.window_samples])
        return torch.cat([self.band_statistics(levels), self._rhythm(levels)], dim=1)

    def levels(self, waves: Tensor) -> Tensor:
        """Compute smoothed levels `[b, m, f]` of m mel bands, in bels relative to the loudest value of each clip."""
        energy = self.mel(waves)
        peak = reduce(energy, "b m f -> b 1 1", "max").clamp_min(1e-12)
        levels = (energy / peak + 10.0 ** (-self.dynamic_range_db / 10)).log10()
        return F.avg_pool1d(levels, SMOOTH_FRAMES, 1, SMOOTH_FRAMES // 2, count_include_pad=False)

    @staticmethod
    def band_statistics(levels: Tensor) -> Tensor:
        """Compute statistics over time of the level of each mel band and of the changes of the level."""
        quantiles = levels.quantile(levels.new_tensor(QUANTILES), dim=2)
        parts = [levels.mean(2), levels.std(2), rearrange(quantiles, "q b m -> b (m q)")]
        for lag in CHANGE_LAGS_FRAMES:
            change = levels[:, :, lag:] - levels[:, :, :-lag]
            parts += [change.abs().mean(2), change.clamp_min(0).mean(2)]
        return torch.cat(parts, dim=1)

    @staticmethod
    def _rhythm(levels: Tensor) -> Tensor:
        """Compute the autocorrelation and the modulation spectrum of the onset strength in each frequency region."""
        rises = (levels[:, :, ONSET_LAG_FRAMES:] - levels[:, :, :-ONSET_LAG_FRAMES]).clamp_min(0)
        regions = reduce(rises, "b (r m) f -> b r f", "mean", r=NUM_ONSET_BANDS)
        onsets = torch.cat([regions, reduce(rises, "b m f -> b 1 f", "mean")], dim=1)
        onsets = onsets - onsets.mean(2, keepdim=True)
        num_frames = onsets.shape[2]

        # Wiener-Khinchin theorem; the transform is so long that no lag wraps around.
        spectrum = torch.fft.rfft(onsets, n=RHYTHM_FFT_FRAMES).abs().square()
        correlation = torch.fft.irfft(spectrum)[:, :, : PULSE_LAGS_FRAMES[1]]
        pulse = (correlation / (correlation[:, :, :1] + 1e-4 * num_frames))[:, :, PULSE_LAGS_FRAMES[0] :]

        window = torch.hann_window(num_frames, device=onsets.device)
        modulation = torch.fft.rfft(onsets * window, n=RHYTHM_FFT_FRAMES).abs().square()
        modulation = F.avg_pool1d(modulation[:, :, slice(*RHYTHM_BINS)], RHYTHM_POOL)
        modulation = modulation / (modulation.sum(2, keepdim=True) + 1e-3)

        pulse = F.avg_pool1d(pulse, RHYTHM_POOL)
        parts = [pulse.flatten(1), (modulation + 1e-3).log().flatten(1), onsets.std(2)]
        return torch.cat(parts, dim=1)
