"""Distances between a reconstructed wave and the original wave."""

import torch
from einops import pack, unpack
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.checks.types import typed

__all__ = ["si_sdr_db", "stft_distance", "zero_mean"]

_SI_SDR_LIMIT_DB = 100.0
# -80 dB of full scale, as in MultiScaleMelLoss, because quieter parts are inaudible
_FLOOR = 1e-4
# FFT, window and hop (samples): table 1 of arXiv 1910.11480
_FFTS_WINDOWS_AND_HOPS = ((512, 240, 50), (1024, 600, 120), (2048, 1200, 240))


@typed
def si_sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio of zero-mean signals (arXiv 1811.02508, eq. 4 and 5).

    The means of the waves `[..., n]` are removed first. The signal is the projection of the estimate onto the target,
    and the distortion is the rest of the estimate. The ratios `[...]` float64 in dB are limited to -100..100. The ratio
    is 100 dB for a scaled copy of the target or for two silent waves, and -100 dB if only one wave is silent.
    """
    if estimate.shape != target.shape or estimate.shape[-1:].numel() == 0:
        raise ValueError(
            f"estimate and target must have the same shape with at least one sample, got {list(estimate.shape)} and "
            f"{list(target.shape)}"
        )
    estimate, target = zero_mean(estimate.double()), zero_mean(target.double())
    power = target.square().sum(dim=-1, keepdim=True)
    dot = (estimate * target).sum(dim=-1, keepdim=True)
    projection = dot / power.clamp(min=torch.finfo(torch.float64).tiny) * target
    signal, distortion = projection.square().sum(dim=-1), (estimate - projection).square().sum(dim=-1)
    ratio_db = 10 * (signal / distortion).log10()
    both_silent = (signal == 0) & (distortion == 0) & (power[..., 0] == 0)
    # The remaining 0 / 0 occurs if only the estimate is silent.
    ratio_db = ratio_db.nan_to_num(nan=-_SI_SDR_LIMIT_DB).clamp(-_SI_SDR_LIMIT_DB, _SI_SDR_LIMIT_DB)
    return ratio_db.masked_fill(both_silent, _SI_SDR_LIMIT_DB)


def zero_mean(wave: Tensor) -> Tensor:
    """Subtract the mean from waves `[..., n]`; constant waves become exactly zero, without rounding errors."""
    centred = wave - wave.mean(dim=-1, keepdim=True)
    is_constant = centred.abs().amax(dim=-1, keepdim=True) <= 1e-12 * wave.abs().amax(dim=-1, keepdim=True)
    return centred.masked_fill(is_constant, 0.0)


@typed
def stft_distance(estimate: Tensor, target: Tensor) -> Tensor:
    """Multi-resolution STFT distance `[...]` of waves `[..., n]` (Parallel WaveGAN, arXiv 1910.11480, eq. 3 to 6).

    The distance of a magnitude spectrogram S from the target T is `|T - S| / |T|` (Frobenius norms) plus the mean of
    `|log T - log S|` in nepers. The STFT distance is the mean of the distances at three STFT resolutions. The STFT uses
    a Hann window and is scaled so that a full-scale sine has magnitude 1; magnitudes below -80 dB count as -80 dB. STFT
    frames are centred on multiples of the hop size, and waves are padded by reflection.
    """
    distances = []
    for n_fft, window_samples, hop_samples in _FFTS_WINDOWS_AND_HOPS:
        s, t = (_magnitudes(wave, n_fft, window_samples, hop_samples) for wave in (estimate, target))
        convergence = (t - s).square().sum(dim=(-2, -1)).sqrt() / t.square().sum(dim=(-2, -1)).sqrt()
        distances.append(convergence + (t.log() - s.log()).abs().mean(dim=(-2, -1)))
    return torch.stack(distances).mean(dim=0)


def _magnitudes(wave: Tensor, n_fft: int, window_samples: int, hop_samples: int) -> Tensor:
    """Compute STFT magnitudes `[..., bins, f]` of waves `[..., n]`, with `_FLOOR` as the lowest magnitude."""
    flat, leading = pack([wave.float()], "* n")
    half = n_fft // 2
    flat = F.pad(flat, (half, half), mode="reflect" if wave.shape[-1] > half else "constant")
    window = torch.hann_window(window_samples, device=wave.device)
    spectrum = torch.stft(flat, n_fft, hop_samples, window_samples, window, center=False, return_complex=True)
    magnitudes = (spectrum.abs() * (4.0 / window_samples)).clamp(min=_FLOOR)
    return unpack(magnitudes, leading, "* bins f")[0]
