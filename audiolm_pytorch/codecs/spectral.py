"""A codec pair that works at the frame rate: spectrum in, inverse-STFT out.

All layers run once a frame (50 Hz) instead of once a sample, which makes the pair about a hundred times cheaper than a
convolutional codec of the same width: two CPU cores train it in minutes. After Vocos (arXiv 2306.00814, section 3):
ConvNeXt blocks and a head that predicts magnitude and phase of every STFT frame.
"""

from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.streaming import FrameStream
from audiolm_pytorch.saving.modules import register

__all__ = ["ConvNeXtBlock", "SpectralDecoder", "SpectralEncoder"]

# log-magnitudes of 16-bit audio run from about -11 (silence) to 3; this maps them near [-1.5, 1.5]
_LOG_FLOOR = 1e-5
_LOG_CENTRE, _LOG_SCALE = -5.0, 4.0
# exp() of the head's log-magnitude is bounded, as a wild value early in training would reach the wave (Vocos, code)
_MAX_MAGNITUDE = 1e2


# Outside of training, longer sequences go through in pieces: 250 frames take about 30 MB on the way, 3000 about 120 MB,
# and a frame takes a tenth longer.
_PIECE_FRAMES = 250
_KERNEL_FRAMES = 7


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * rearrange(mask, "b f -> b f 1").to(x.dtype)


def _lookahead_frames(num_convolutions: int, hop_samples: int, window_samples: int) -> int:
    """Frames on either side that a frame depends on: the convolutions' kernels and half of the overlapping windows."""
    overlap_samples = (window_samples - hop_samples) // 2
    return num_convolutions * (_KERNEL_FRAMES // 2) + -(-overlap_samples // hop_samples)


def _config(channels: int, **config: Any) -> dict[str, Any]:
    """The constructor's numbers; mono is left out, so that models saved before there was stereo keep their hash."""
    return config if channels == 1 else {**config, "channels": channels}


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a gated-by-nothing MLP: the 1-D ConvNeXt block (arXiv 2201.03545, fig. 4).

    Args:
        dim: Width d.
        kernel_size: Frames the depthwise convolution sees (odd).
        expansion: MLP width as a multiple of `dim`.
        layer_scale: Initial residual weight.
    """

    def __init__(
        self, dim: int, kernel_size: int = _KERNEL_FRAMES, expansion: int = 3, layer_scale: float = 0.2
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * expansion), nn.GELU(), nn.Linear(dim * expansion, dim))
        self.scale = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames `[b, f, d]` and an optional mask `[b, f]` (True = real) to frames `[b, f, d]`."""
        y = rearrange(self.depthwise(rearrange(x, "b f d -> b d f")), "b d f -> b f d")
        return _masked(x + self.scale * self.mlp(self.norm(y)), mask)


@register
class SpectralEncoder(nn.Module):
    """Log-magnitude STFT frames through ConvNeXt blocks.

    Args:
        dim: Width of the blocks and of the frames that come out.
        depth: Number of blocks.
        hop_samples: Samples per frame.
        window_samples: STFT window; `hop_samples * 4` if not given.
        channels: Audio channels in; they share the window and lie side by side in the first layer.
    """

    window: Tensor

    @beartype
    def __init__(
        self, *, dim: int, depth: int, hop_samples: int, window_samples: int | None = None, channels: int = 1
    ) -> None:
        super().__init__()
        window_samples = window_samples or hop_samples * 4
        if window_samples < hop_samples or (window_samples - hop_samples) % 2:
            raise ValueError(
                f"window_samples must exceed hop_samples by an even number, got {window_samples} and {hop_samples}"
            )
        self.config = _config(channels, dim=dim, depth=depth, hop_samples=hop_samples, window_samples=window_samples)
        self.channels, self.dim, self.downsample_factor, self.window_samples = (
            channels,
            dim,
            hop_samples,
            window_samples,
        )
        self.lookahead_frames = _lookahead_frames(depth, hop_samples, window_samples)
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
        self.embed = nn.Linear(channels * (window_samples // 2 + 1), dim)
        self.blocks = nn.ModuleList([ConvNeXtBlock(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpectralEncoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waves `[b, c, n]` with n a multiple of the hop to frames `[b, f, d]`; `mask [b, f]` marks real frames."""
        return self._encode(wave, mask) if torch.is_grad_enabled() else self.stream(mask).whole(wave)

    def stream(self, mask: Tensor | None = None) -> FrameStream:
        """A stream of waves `[b, c, n]` (any n) to frames `[b, f, d]`; `mask [b, f]` marks real frames, if given."""

        def run(wave: Tensor, first_frame: int) -> Tensor:
            num_frames = wave.shape[-1] // self.downsample_factor
            return self._encode(wave, None if mask is None else mask[:, first_frame : first_frame + num_frames])

        return FrameStream(
            run,
            in_axis=-1,
            in_steps=self.downsample_factor,
            out_axis=1,
            out_steps=1,
            out_width=self.dim,
            reach_frames=self.lookahead_frames,
            budget_frames=_PIECE_FRAMES,
        )

    def _encode(self, wave: Tensor, mask: Tensor | None) -> Tensor:
        x = _masked(self.embed(self.features(wave)), mask)
        for block in self.blocks:
            x = block(x, mask)
        return _masked(self.norm(x), mask)

    def features(self, wave: Tensor) -> Tensor:
        """Normalised log-magnitudes `[b, f, c * bins]` of waves `[b, c, n]`, float32 whatever autocast says."""
        with torch.autocast(wave.device.type, enabled=False):
            # same-padding: frame k is centred on samples [k * hop, (k + 1) * hop)
            pad = (self.window_samples - self.downsample_factor) // 2
            padded = F.pad(rearrange(wave.float(), "b c n -> (b c) n"), (pad, pad))
            spectrum = torch.stft(
                padded,
                self.window_samples,
                self.downsample_factor,
                window=self.window,
                center=False,
                return_complex=True,
            )
            # |S| of a full-scale sine is half the window's sum: dividing puts it near 1 for any window
            magnitude = spectrum.abs() * (2.0 / self.window.sum())
            log_magnitude = magnitude.clamp(min=_LOG_FLOOR).log()
        return rearrange((log_magnitude - _LOG_CENTRE) / _LOG_SCALE, "(b c) bins f -> b f (c bins)", c=self.channels)


@register
class SpectralDecoder(nn.Module):
    """ConvNeXt blocks and an inverse-STFT head (Vocos, arXiv 2306.00814, section 3.2).

    Args:
        dim: Width of the blocks.
        depth: Number of blocks.
        hop_samples: Samples per frame.
        window_samples: STFT window; `hop_samples * 4` if not given.
        input_dim: Width of the quantized frames, `dim` if not given.
        channels: Audio channels out.
    """

    window: Tensor

    @beartype
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
        super().__init__()
        window_samples = window_samples or hop_samples * 4
        input_dim = input_dim or dim
        if window_samples < hop_samples or (window_samples - hop_samples) % 2:
            raise ValueError(
                f"window_samples must exceed hop_samples by an even number, got {window_samples} and {hop_samples}"
            )
        self.config = _config(
            channels, dim=dim, depth=depth, hop_samples=hop_samples, window_samples=window_samples, input_dim=input_dim
        )
        self.channels, self.upsample_factor, self.window_samples = channels, hop_samples, window_samples
        self.input_dim = input_dim
        self.lookahead_frames = _lookahead_frames(1 + depth, hop_samples, window_samples)
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
        self.embed = nn.Conv1d(input_dim, dim, _KERNEL_FRAMES, padding=_KERNEL_FRAMES // 2)
        self.blocks = nn.ModuleList([ConvNeXtBlock(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, channels * (window_samples + 2))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpectralDecoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor) -> Tensor:
        """Quantized frames `[b, f, d]` to waves `[b, c, f * hop]`."""
        return self._decode(frames) if torch.is_grad_enabled() else self.stream().whole(frames)

    def stream(self) -> FrameStream:
        """A stream of quantized frames `[b, f, d]` to waves `[b, c, n]`."""
        return FrameStream(
            lambda frames, first_frame: self._decode(frames),
            in_axis=1,
            in_steps=1,
            out_axis=-1,
            out_steps=self.upsample_factor,
            out_width=self.channels,
            reach_frames=self.lookahead_frames,
            budget_frames=_PIECE_FRAMES,
        )

    def _decode(self, frames: Tensor) -> Tensor:
        x = rearrange(self.embed(rearrange(frames, "b f d -> b d f")), "b d f -> b f d")
        for block in self.blocks:
            x = block(x)
        head = self.head(self.norm(x))
        with torch.autocast(frames.device.type, enabled=False):
            log_magnitude, phase = rearrange(
                head.float(), "b f (c two bins) -> two (b c) bins f", two=2, c=self.channels
            )
            spectrum = torch.polar(log_magnitude.exp().clamp(max=_MAX_MAGNITUDE), phase)
            return rearrange(self._overlap_add(spectrum), "(b c) n -> b c n", c=self.channels)

    def _overlap_add(self, spectrum: Tensor) -> Tensor:
        """Inverse STFT with same-padding: `[b, bins, f]` to `[b, f * hop]`, divided by the window's envelope."""
        hop, window_samples, num_frames = self.upsample_factor, self.window_samples, spectrum.shape[-1]
        frames = torch.fft.irfft(spectrum, n=window_samples, dim=1) * rearrange(self.window, "w -> w 1")
        squares = (self.window**2).view(1, -1, 1).expand(1, -1, num_frames)
        size = (1, (num_frames - 1) * hop + window_samples)
        wave, envelope = (
            F.fold(x, output_size=size, kernel_size=(1, window_samples), stride=(1, hop))[:, 0, 0]
            for x in (frames, squares)
        )
        pad = (window_samples - hop) // 2
        keep = slice(pad, pad + num_frames * hop)
        return wave[:, keep] / envelope[:, keep].clamp(min=1e-3)
