"""Mel filters and the mel spectrogram."""

from typing import Any, Literal

import numpy as np
import torch
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional as F

from audiolm_pytorch.audio.waves import check_dtype
from audiolm_pytorch.checks.types import typed

__all__ = ["MelSpectrogram", "mel_edges", "mel_filterbank", "triangular_filters"]

_MAX_VALUES = 2**24  # filters are built in float64, several times as large as the file of a small model


@typed
def mel_filterbank(
    sample_hz: int, n_fft: int, num_mels: int, f_min_hz: float = 0.0, f_max_hz: float | None = None
) -> Tensor:
    """Build triangular filters `[num_mels, n_fft // 2 + 1]` with a peak of 1, equally spaced on the HTK mel scale.

    mel(f) = 2595 log10(1 + f / 700), see the HTK Book, sec. 5.4 (Young et al.). `f_max_hz=None` means half the sample
    rate.
    """
    if sample_hz < 1 or n_fft < 1:
        raise ValueError(f"sample_hz and n_fft must be at least 1, got sample_hz={sample_hz}, n_fft={n_fft}")
    top_hz = sample_hz / 2 if f_max_hz is None else f_max_hz
    if num_mels < 1 or not 0 <= f_min_hz < top_hz <= sample_hz / 2:
        raise ValueError(
            f"need num_mels >= 1 and 0 <= f_min_hz < f_max_hz <= {sample_hz / 2}, got num_mels={num_mels}, "
            f"f_min_hz={f_min_hz}, f_max_hz={top_hz}"
        )
    filters = triangular_filters(mel_edges(f_min_hz, top_hz, num_mels), sample_hz, n_fft)
    empty = np.flatnonzero(filters.max(axis=1) <= 0.0)
    if len(empty):
        raise ValueError(
            f"{len(empty)} of {num_mels} mel filters would be empty (the first is filter {empty[0]}) for n_fft={n_fft} "
            f"at {sample_hz} Hz; use fewer mels, a larger n_fft or a higher f_min_hz"
        )
    return torch.from_numpy(filters).float()


def mel_edges(
    f_min_hz: float, f_max_hz: float, num_mels: int, scale: Literal["htk", "slaney"] = "htk"
) -> "np.ndarray[Any, Any]":
    """Compute the edges of overlapping frequency bands, equally spaced on a mel scale.

    Args:
        scale: "htk" is the scale of `mel_filterbank`. "slaney" is the scale of the Auditory Toolbox (Slaney, 1998) and
            of librosa, with 200/3 Hz per mel up to 1 kHz and a factor of 6.4 every 27 mels above.

    Returns:
        Band edges `[num_mels + 2]` in Hz, float64. Band i extends from edge i to edge i + 2; its centre is edge i + 1.
    """
    if num_mels > _MAX_VALUES:
        raise ValueError(f"num_mels must be at most {_MAX_VALUES}, got {num_mels}")
    span_hz = np.array([f_min_hz, f_max_hz], dtype=np.float64)
    if scale == "htk":
        low_mel, high_mel = 2595.0 * np.log10(1.0 + span_hz / 700.0)
        edges_mel = np.linspace(low_mel, high_mel, num_mels + 2)
        return 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    linear_hz, knee_hz, growth = 200.0 / 3.0, 1000.0, np.log(6.4) / 27.0
    knee_mel = knee_hz / linear_hz
    above = knee_mel + np.log(np.maximum(span_hz, knee_hz) / knee_hz) / growth
    low_mel, high_mel = np.where(span_hz < knee_hz, span_hz / linear_hz, above)
    edges_mel = np.linspace(low_mel, high_mel, num_mels + 2)
    bent_hz = knee_hz * np.exp(growth * (np.maximum(edges_mel, knee_mel) - knee_mel))
    return np.where(edges_mel < knee_mel, edges_mel * linear_hz, bent_hz)


def triangular_filters(edges_hz: "np.ndarray[Any, Any]", sample_hz: int, n_fft: int) -> "np.ndarray[Any, Any]":
    """Build triangular filters over FFT bins; filter i rises from edge i to edge i + 1 and falls to edge i + 2.

    For m filters, `edges_hz` contains m + 2 edges in ascending order. The filters `[m, n_fft // 2 + 1]` are float64.
    The peak of each filter is 1, but it can lie between two FFT bins; the largest weight is then below 1.
    """
    if len(edges_hz) * n_fft > _MAX_VALUES:
        raise ValueError(
            f"{len(edges_hz) - 2} mel filters of n_fft={n_fft} are too large; at most {_MAX_VALUES} values are possible"
        )
    lower, centre, upper = (rearrange(edges_hz[i : len(edges_hz) - 2 + i], "m -> m 1") for i in range(3))
    bins_hz = np.arange(n_fft // 2 + 1) * sample_hz / n_fft
    return np.minimum((bins_hz - lower) / (centre - lower), (upper - bins_hz) / (upper - centre)).clip(min=0.0)


class MelSpectrogram(nn.Module):
    """Mel spectrogram with a Hann window, computed in float32 even under autocast.

    Args:
        win_length: Length of the window (samples), which is centred in the Fourier transform; None = `n_fft`.
        f_max_hz: Upper edge of the highest band; None = half the sample rate.
        power: 1 for magnitudes, 2 for energies.
        center: True centres frame i on sample `i * hop_length` and pads the wave by reflection, or with zeros if the
            wave is too short; False begins frame i at sample `i * hop_length`, without padding.
    """

    filters: Tensor

    @typed
    def __init__(
        self,
        *,
        sample_hz: int,
        n_fft: int,
        hop_length: int,
        num_mels: int,
        win_length: int | None = None,
        f_min_hz: float = 0.0,
        f_max_hz: float | None = None,
        power: float = 1.0,
        center: bool = True,
    ) -> None:
        super().__init__()
        window = n_fft if win_length is None else win_length
        if not 1 <= window <= n_fft or hop_length < 1 or not 0 < power < float("inf"):
            raise ValueError(
                f"need 1 <= win_length <= n_fft, hop_length >= 1 and power > 0, got win_length={win_length}, "
                f"n_fft={n_fft}, hop_length={hop_length}, power={power}"
            )
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, window
        self.power, self.center = float(power), center
        self.sample_hz, self.num_mels, self.f_min_hz, self.f_max_hz = sample_hz, num_mels, f_min_hz, f_max_hz
        filters = mel_filterbank(sample_hz, n_fft, num_mels, f_min_hz, f_max_hz)
        self.register_buffer("filters", filters, persistent=False)

    def num_frames(self, num_samples: int) -> int:
        """Number of spectrogram frames of a wave of `num_samples` samples."""
        return 1 + (num_samples if self.center else num_samples - self.n_fft) // self.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """Compute the spectrogram `[..., num_mels, f]` (float32, >= 0) of `wave [..., n]`; f is `num_frames(n)`."""
        check_dtype(wave)
        if not wave.ndim or 0 in wave.shape[:-1]:
            raise ValueError(f"wave must be [..., n] with at least one item, got shape {list(wave.shape)}")
        num_samples = wave.shape[-1]
        if num_samples < (1 if self.center else self.n_fft):
            raise ValueError(f"wave has {num_samples} samples, must have at least {1 if self.center else self.n_fft}")
        with torch.autocast(device_type=wave.device.type, enabled=False):
            flat, leading = pack([wave.float()], "* n")
            if self.center:
                half = self.n_fft // 2
                flat = F.pad(flat, (half, half), mode="reflect" if num_samples > half else "constant")
            # Not a buffer, because in half precision the rounded window would leak tones into all bands.
            window = torch.hann_window(self.win_length, dtype=torch.float32, device=wave.device)
            spectrum = torch.stft(
                flat, self.n_fft, self.hop_length, self.win_length, window, center=False, return_complex=True
            )
            mels = self.filters.float() @ spectrum.abs().pow(self.power)
        return unpack(mels, leading, "* m f")[0]
