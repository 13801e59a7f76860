"""An encoder and a decoder that work on a spectrogram with one column per codec frame.

All layers of the networks run once per frame (50 Hz), not once per sample. Encoder and decoder need about 1% of the
operations of a convolutional codec of the same width, so that two CPU cores train them in minutes. The networks follow
Vocos (arXiv 2306.00814, section 3), with ConvNeXt blocks and a head that predicts magnitude and phase of STFT frames.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.networks import WaveDecoder, WaveEncoder
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.nn.streaming import StreamState
from audiolm_pytorch.saving.modules import register

__all__ = ["ConvNeXtBlock", "SpectralDecoder", "SpectralEncoder"]

# Log-magnitudes of 16-bit audio run from about -11 (silence) to 3; this maps them to about [-1.5, 1.5].
_MAGNITUDE_FLOOR = 1e-5
_LOG_CENTRE, _LOG_SCALE = -5.0, 4.0
# Upper bound of predicted magnitudes, as in the code of Vocos; it limits extreme values early in training.
_MAX_MAGNITUDE = 1e2
# Frames per chunk outside of training: 250 need about 30 MB; 3000 need 120 MB and 10% less time per frame.
_CHUNK_FRAMES = 250
# ConvNeXt blocks: frames of the convolution, MLP width as a multiple of the width, initial weight of the branch
_KERNEL_FRAMES, _EXPANSION, _BRANCH_SCALE = 7, 3, 0.2


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * rearrange(mask, "b f -> b f 1").to(x.dtype)


class ConvNeXtBlock(nn.Module):
    """1-D ConvNeXt block: a depthwise convolution over time, followed by an MLP (arXiv 2201.03545, fig. 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, _KERNEL_FRAMES, padding=_KERNEL_FRAMES // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, _EXPANSION * dim), nn.GELU(), nn.Linear(_EXPANSION * dim, dim))
        self.scale = nn.Parameter(torch.full((dim,), _BRANCH_SCALE))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the ConvNeXt block to frames `[b, f, d]`; the optional `mask [b, f]` is False at padding."""
        y = rearrange(self.depthwise(rearrange(x, "b f d -> b d f")), "b d f -> b f d")
        return _masked(x + self.scale * self.mlp(self.norm(y)), mask)


class _SpectralNetwork(nn.Module):
    """Base class of `SpectralEncoder` and `SpectralDecoder`, with STFT window, ConvNeXt blocks and final norm."""

    def __init__(
        self, embed: nn.Module, *, dim: int, depth: int, hop_samples: int, window_samples: int, channels: int
    ) -> None:
        super().__init__()
        check_positive(dim=dim, channels=channels)
        self.hop_samples, self.window_samples, self.channels = hop_samples, window_samples, channels
        self.embed = embed
        self.blocks = nn.ModuleList([ConvNeXtBlock(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def _window(self, device: torch.device) -> Tensor:
        """Return the STFT window; a buffer would lose its precision together with the weights."""
        return torch.hann_window(self.window_samples, dtype=torch.float32, device=device)

    def _budget_frames(self) -> int:
        return _CHUNK_FRAMES

    def _reach_frames(self, num_convolutions: int) -> int:
        """Number of frames on each side of a frame that influence its output (convolutions, overlapping windows)."""
        overlap_samples = (self.window_samples - self.hop_samples) // 2
        return num_convolutions * (_KERNEL_FRAMES // 2) + -(-overlap_samples // self.hop_samples)


def _checked_window(hop_samples: int, window_samples: int | None) -> int:
    check_positive(hop_samples=hop_samples)
    window_samples = window_samples or hop_samples * 4
    if window_samples < hop_samples or (window_samples - hop_samples) % 2:
        raise ValueError(
            f"window_samples must be hop_samples plus an even number, got window_samples={window_samples} and "
            f"hop_samples={hop_samples}"
        )
    return window_samples


def _config(
    sizes: dict[str, Any], *, channels: int, magnitude_floor: float = _MAGNITUDE_FLOOR, **config: Any
) -> dict[str, Any]:
    """Return the constructor arguments without later defaults, so that fingerprints equal those of older models."""
    added: dict[str, Any] = {} if channels == 1 else {"channels": channels}
    if magnitude_floor != _MAGNITUDE_FLOOR:
        added["magnitude_floor"] = magnitude_floor
    return {**sizes, **config, **added}


@register
class SpectralEncoder(_SpectralNetwork, WaveEncoder):
    """Encoder that applies ConvNeXt blocks to log-magnitude STFT frames; blocks and encoded frames have width `dim`.

    A frame has `hop_samples` samples. The default STFT window has `4 * hop_samples` samples. The first layer receives
    the concatenated spectra of all audio channels.

    Args:
        magnitude_floor: Smallest magnitude that the encoder receives, where a full-scale sine has magnitude 1. Without
            a floor near the hearing threshold, inaudible noise changes the logarithms of quiet bins, and so the codes.
            Noise at -50 dB below music has magnitudes of about 2e-5 in windows of 80 ms; the default is -100 dB.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        hop_samples: int,
        window_samples: int | None = None,
        channels: int = 1,
        magnitude_floor: float = _MAGNITUDE_FLOOR,
    ) -> None:
        if not 0 < magnitude_floor < 1:
            raise ValueError(f"magnitude_floor must be above 0 and below 1 (full scale), got {magnitude_floor}")
        check_positive(dim=dim, channels=channels)
        window_samples = _checked_window(hop_samples, window_samples)
        sizes = dict(dim=dim, depth=depth, hop_samples=hop_samples, window_samples=window_samples)
        super().__init__(nn.Linear(channels * (window_samples // 2 + 1), dim), channels=channels, **sizes)
        self.config = _config(sizes, channels=channels, magnitude_floor=magnitude_floor)
        self.magnitude_floor = magnitude_floor
        self.dim, self.downsample_factor, self.lookahead_frames = dim, hop_samples, self._reach_frames(depth)

    def _encode(self, wave: Tensor, mask: Tensor | None, state: StreamState | None) -> Tensor:
        x = _masked(self.embed(self.features(wave).to(self.norm.weight.dtype)), mask)
        for block in self.blocks:
            x = block(x, mask)
        return _masked(self.norm(x), mask)

    def features(self, wave: Tensor) -> Tensor:
        """Compute normalised log-magnitudes `[b, f, c * bins]` of waves `[b, c, n]`, in float32 also under autocast."""
        with torch.autocast(wave.device.type, enabled=False):
            # With same-padding, frame k is centred on samples [k * hop, (k + 1) * hop).
            pad = (self.window_samples - self.hop_samples) // 2
            padded = F.pad(rearrange(wave.float(), "b c n -> (b c) n"), (pad, pad))
            window = self._window(wave.device)
            spectrum = torch.stft(
                padded, self.window_samples, self.hop_samples, window=window, center=False, return_complex=True
            )
            # The peak of a full-scale sine is half the window's sum; the division brings it near 1 for any window.
            magnitude = spectrum.abs() * (2.0 / window.sum())
            log_magnitude = magnitude.clamp(min=self.magnitude_floor).log()
        return rearrange((log_magnitude - _LOG_CENTRE) / _LOG_SCALE, "(b c) bins f -> b f (c bins)", c=self.channels)


@register
class SpectralDecoder(_SpectralNetwork, WaveDecoder):
    """Decoder of ConvNeXt blocks and an inverse-STFT head (Vocos, arXiv 2306.00814, section 3.2).

    A frame has `hop_samples` samples. The default STFT window has `4 * hop_samples` samples, and the default width of
    the quantized frames, `input_dim`, is `dim`.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        hop_samples: int,
        window_samples: int | None = None,
        input_dim: int | None = None,
        channels: int = 1,
    ) -> None:
        window_samples, input_dim = _checked_window(hop_samples, window_samples), input_dim or dim
        embed = nn.Conv1d(input_dim, dim, _KERNEL_FRAMES, padding=_KERNEL_FRAMES // 2)
        sizes = dict(dim=dim, depth=depth, hop_samples=hop_samples, window_samples=window_samples)
        super().__init__(embed, channels=channels, **sizes)
        self.config = _config(sizes, channels=channels, input_dim=input_dim)
        self.input_dim, self.upsample_factor = input_dim, hop_samples
        self.lookahead_frames = self._reach_frames(1 + depth)
        self.head = nn.Linear(dim, channels * (window_samples + 2))

    def _decode(self, frames: Tensor, state: StreamState | None) -> Tensor:
        x = rearrange(self.embed(rearrange(frames, "b f d -> b d f")), "b d f -> b f d")
        for block in self.blocks:
            x = block(x)
        head = self.head(self.norm(x))
        with torch.autocast(frames.device.type, enabled=False):
            log_magnitude, phase = rearrange(
                head.float(), "b f (c two bins) -> two (b c) bins f", two=2, c=self.channels
            )
            spectrum = torch.polar(log_magnitude.exp().clamp(max=_MAX_MAGNITUDE), phase)
            wave = self._overlap_add(spectrum).to(self.norm.weight.dtype)
            return rearrange(wave, "(b c) n -> b c n", c=self.channels)

    def _overlap_add(self, spectrum: Tensor) -> Tensor:
        """Compute waves `[b, f * hop]` of an STFT `[b, bins, f]` by overlap-add and division by the window envelope."""
        hop, window_samples, num_frames = self.hop_samples, self.window_samples, spectrum.shape[-1]
        window = self._window(spectrum.device)
        frames = torch.fft.irfft(spectrum, n=window_samples, dim=1) * rearrange(window, "w -> w 1")
        squares = (window**2).view(1, -1, 1).expand(1, -1, num_frames)
        size = (1, (num_frames - 1) * hop + window_samples)
        wave, envelope = (
            F.fold(x, output_size=size, kernel_size=(1, window_samples), stride=(1, hop))[:, 0, 0]
            for x in (frames, squares)
        )
        pad = (window_samples - hop) // 2
        keep = slice(pad, pad + num_frames * hop)
        return wave[:, keep] / envelope[:, keep].clamp(min=1e-3)
