"""How near a reconstruction is to its original, and what it costs: distances of waves, bitrate of codes."""

import math
from collections.abc import Sequence

import torch
from beartype import beartype
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional as F

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss

__all__ = ["SI_SDR_LIMIT_DB", "MultiResolutionSTFTDistance", "WaveDistances", "bitrate_kbps", "si_sdr_db"]

SI_SDR_LIMIT_DB = 100.0
# -80 dB of full scale, as in MultiScaleMelLoss: what is quieter is not heard and shall cost nothing
_FLOOR = 1e-4
# FFT, window and hop (samples): table 1 of arXiv 1910.11480
_FFTS_WINDOWS_AND_HOPS = ((512, 240, 50), (1024, 600, 120), (2048, 1200, 240))


@beartype
def si_sdr_db(estimate: Tensor, target: Tensor, zero_mean: bool = True) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019, arXiv 1811.02508, eq. 4 and 5).

    The estimate's projection onto the target is the signal; what the estimate holds besides is distortion.

    Args:
        estimate: `[..., n]`.
        target: `[..., n]`.
        zero_mean: Whether to remove the mean of both first; a constant offset is not heard.

    Returns:
        `[...]` float64 in dB, within -100..100: 100 for a copy (of any volume, silence of silence included), -100 if
        only one of the two is silent.

    Raises:
        ValueError: If the shapes differ or there are no samples.
    """
    if estimate.shape != target.shape or estimate.shape[-1:].numel() == 0:
        raise ValueError(
            f"estimate and target must have the same shape with at least one sample, got {list(estimate.shape)} and "
            f"{list(target.shape)}"
        )
    estimate, target = estimate.double(), target.double()
    if zero_mean:
        estimate, target = _centred(estimate), _centred(target)
    power = target.square().sum(dim=-1, keepdim=True)
    dot = (estimate * target).sum(dim=-1, keepdim=True)
    wanted = dot / power.clamp(min=torch.finfo(torch.float64).tiny) * target
    signal, distortion = wanted.square().sum(dim=-1), (estimate - wanted).square().sum(dim=-1)
    ratio_db = 10 * (signal / distortion).log10()
    both_silent = (signal == 0) & (distortion == 0) & (power[..., 0] == 0)
    # 0 / 0 is left where the estimate alone is silent
    ratio_db = ratio_db.nan_to_num(nan=-SI_SDR_LIMIT_DB).clamp(-SI_SDR_LIMIT_DB, SI_SDR_LIMIT_DB)
    return ratio_db.masked_fill(both_silent, SI_SDR_LIMIT_DB)


def _centred(wave: Tensor) -> Tensor:
    """Waves `[..., n]` without their mean; the rounding errors that remain of a constant are no signal."""
    centred = wave - wave.mean(dim=-1, keepdim=True)
    is_constant = centred.abs().amax(dim=-1, keepdim=True) <= 1e-12 * wave.abs().amax(dim=-1, keepdim=True)
    return centred.masked_fill(is_constant, 0.0)


class MultiResolutionSTFTDistance(nn.Module):
    """Multi-resolution STFT distance (Parallel WaveGAN, arXiv 1910.11480, eq. 3 to 6).

    For every resolution, with S and T the magnitude spectrograms of estimate and target, the spectral convergence
    `|T - S| / |T|` (Frobenius norms) plus the mean of `|log T - log S|` in nepers; then the mean over resolutions.
    Magnitudes are of a Hann window, scaled so that a full-scale sine has 1, and those below -80 dB count as -80 dB;
    frames are centred on every hop, the ends are mirrored.

    Args:
        ffts_windows_and_hops: FFT size, window and hop (samples) of each resolution.
    """

    @beartype
    def __init__(self, ffts_windows_and_hops: Sequence[tuple[int, int, int]] = _FFTS_WINDOWS_AND_HOPS) -> None:
        super().__init__()
        self.ffts_windows_and_hops = tuple(ffts_windows_and_hops)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Distance of waves `[..., n]` of one shape: `[...]`, 0 for a copy and finite for silence."""
        parts = self.parts(estimate, target)
        return parts[0] + parts[1]

    def parts(self, estimate: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Spectral convergence and log-magnitude distance of waves `[..., n]`, each `[...]`."""
        convergence, log_distance = [], []
        for n_fft, window, hop in self.ffts_windows_and_hops:
            made, wanted = (_magnitudes(wave, n_fft, window, hop) for wave in (estimate, target))
            difference = (wanted - made).square().sum(dim=(-2, -1)).sqrt()
            convergence.append(difference / wanted.square().sum(dim=(-2, -1)).sqrt())
            log_distance.append((wanted.log() - made.log()).abs().mean(dim=(-2, -1)))
        return torch.stack(convergence).mean(dim=0), torch.stack(log_distance).mean(dim=0)


def _magnitudes(wave: Tensor, n_fft: int, window_samples: int, hop: int) -> Tensor:
    """Floored magnitudes `[..., bins, f]` of waves `[..., n]`."""
    flat, leading = pack([wave.float()], "* n")
    half = n_fft // 2
    flat = F.pad(flat, (half, half), mode="reflect" if wave.shape[-1] > half else "constant")
    window = torch.hann_window(window_samples, device=wave.device)
    spectrum = torch.stft(flat, n_fft, hop, window_samples, window, center=False, return_complex=True)
    magnitudes = (spectrum.abs() * (4.0 / window_samples)).clamp(min=_FLOOR)
    return unpack(magnitudes, leading, "* bins f")[0]


class WaveDistances(nn.Module):
    """All distances between two waves at once.

    Args:
        sample_hz: Rate of the waves (Hz).
    """

    NAMES = ("si_sdr_db", "stft", "mel_nepers")

    @beartype
    def __init__(self, sample_hz: int) -> None:
        super().__init__()
        self.sample_hz = sample_hz
        self.mel = MultiScaleMelLoss(sample_hz)
        self.stft = MultiResolutionSTFTDistance()

    @torch.no_grad()
    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, float]:
        """Compare two waves.

        Args:
            estimate: `[c, n]`.
            target: `[c, n]`, the original.

        Returns:
            `si_sdr_db` (all channels as one signal), `stft` (see `MultiResolutionSTFTDistance`, mean over channels) and
            `mel_nepers` (see `MultiScaleMelLoss`).
        """
        made, wanted = (rearrange(_centred(wave.double()), "c n -> (c n)") for wave in (estimate, target))
        return {
            "si_sdr_db": float(si_sdr_db(made, wanted, zero_mean=False)),
            "stft": float(self.stft(estimate, target).mean()),
            "mel_nepers": float(self.mel(rearrange(estimate, "c n -> 1 c n"), rearrange(target, "c n -> 1 c n"))),
        }


@beartype
def bitrate_kbps(codec: Codec, num_levels: int | None = None) -> float:
    """Bits that the codes of a second take, without entropy coding.

    Args:
        codec: The codec.
        num_levels: Levels kept (q); None keeps all.

    Returns:
        `q * log2(v) * target_sample_hz / downsample_factor`, in thousands.

    Raises:
        ValueError: If the codec does not have so many levels.
    """
    if num_levels is not None and not 1 <= num_levels <= codec.num_quantizers:
        raise ValueError(f"num_levels must be in 1..{codec.num_quantizers}, got {num_levels}")
    levels = codec.num_quantizers if num_levels is None else num_levels
    return levels * math.log2(codec.codebook_size) * codec.target_sample_hz / codec.downsample_factor / 1000
