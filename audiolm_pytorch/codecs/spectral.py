"""A codec pair that works at the frame rate: spectrum in, inverse-STFT out.

All layers run once a frame (50 Hz) instead of once a sample, which makes the pair about a hundred times cheaper than a
convolutional codec of the same width: two CPU cores train it in minutes. After Vocos (arXiv 2306.00814, section 3):
ConvNeXt blocks and a head that predicts magnitude and phase of every STFT frame.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.io import register

__all__ = ["ConvNeXtBlock", "SpectralDecoder", "SpectralEncoder"]

# log-magnitudes of 16-bit audio run from about -11 (silence) to 3; this maps them near [-1.5, 1.5]
_LOG_FLOOR = 1e-5
_LOG_CENTRE, _LOG_SCALE = -5.0, 4.0
# exp() of the head's log-magnitude is bounded, as a wild value early in training would reach the wave (Vocos, code)
_MAX_MAGNITUDE = 1e2


# Outside of training, longer sequences go through in pieces: 3000 frames take about 90 MB an item on the way.
_PIECE_FRAMES = 3000
_KERNEL_FRAMES = 7


def _pieces(num_frames: int, reach_frames: int) -> Iterator[tuple[int, int, slice]]:
    """Cut frames into pieces with all the context that a network reaches for.

    Args:
        num_frames: Frames of the whole.
        reach_frames: Neighbours on either side that a frame depends on.

    Yields:
        First frame, frame after the last, and which frames in between are the piece without its context.
    """
    for start in range(0, num_frames, _PIECE_FRAMES):
        stop = min(start + _PIECE_FRAMES, num_frames)
        first, last = max(0, start - reach_frames), min(num_frames, stop + reach_frames)
        yield first, last, slice(start - first, stop - first)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * rearrange(mask, "b f -> b f 1").to(x.dtype)


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
    """

    window: Tensor

    @beartype
    def __init__(self, *, dim: int, depth: int, hop_samples: int, window_samples: int | None = None) -> None:
        super().__init__()
        window_samples = window_samples or hop_samples * 4
        if window_samples < hop_samples or (window_samples - hop_samples) % 2:
            raise ValueError(
                f"window_samples must exceed hop_samples by an even number, got {window_samples} and {hop_samples}"
            )
        self.config: dict[str, Any] = dict(dim=dim, depth=depth, hop_samples=hop_samples, window_samples=window_samples)
        self.dim, self.downsample_factor, self.window_samples = dim, hop_samples, window_samples
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
        self.embed = nn.Linear(window_samples // 2 + 1, dim)
        self.blocks = nn.ModuleList([ConvNeXtBlock(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpectralEncoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waves `[b, 1, n]` with n a multiple of the hop to frames `[b, f, d]`; `mask [b, f]` marks real frames."""
        hop, num_frames = self.downsample_factor, wave.shape[-1] // self.downsample_factor
        if torch.is_grad_enabled() or num_frames <= _PIECE_FRAMES:
            return self._encode(wave, mask)
        reach = len(self.blocks) * (_KERNEL_FRAMES // 2) + -(-self.window_samples // hop)
        return torch.cat(
            [
                self._encode(
                    wave[..., first * hop : last * hop],
                    None if mask is None else mask[:, first:last],
                )[:, own]
                for first, last, own in _pieces(num_frames, reach)
            ],
            dim=1,
        )

    def _encode(self, wave: Tensor, mask: Tensor | None) -> Tensor:
        x = _masked(self.embed(self.features(wave)), mask)
        for block in self.blocks:
            x = block(x, mask)
        return _masked(self.norm(x), mask)

    def features(self, wave: Tensor) -> Tensor:
        """Normalised log-magnitudes `[b, f, bins]` of waves `[b, 1, n]`, float32 whatever autocast says."""
        with torch.autocast(wave.device.type, enabled=False):
            # same-padding: frame k is centred on samples [k * hop, (k + 1) * hop)
            pad = (self.window_samples - self.downsample_factor) // 2
            padded = F.pad(rearrange(wave.float(), "b 1 n -> b n"), (pad, pad))
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
        return rearrange((log_magnitude - _LOG_CENTRE) / _LOG_SCALE, "b bins f -> b f bins")


@register
class SpectralDecoder(nn.Module):
    """ConvNeXt blocks and an inverse-STFT head (Vocos, arXiv 2306.00814, section 3.2).

    Args:
        dim: Width of the blocks.
        depth: Number of blocks.
        hop_samples: Samples per frame.
        window_samples: STFT window; `hop_samples * 4` if not given.
        input_dim: Width of the quantized frames, `dim` if not given.
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
    ) -> None:
        super().__init__()
        window_samples = window_samples or hop_samples * 4
        input_dim = input_dim or dim
        if window_samples < hop_samples or (window_samples - hop_samples) % 2:
            raise ValueError(
                f"window_samples must exceed hop_samples by an even number, got {window_samples} and {hop_samples}"
            )
        self.config: dict[str, Any] = dict(
            dim=dim, depth=depth, hop_samples=hop_samples, window_samples=window_samples, input_dim=input_dim
        )
        self.upsample_factor, self.window_samples, self.input_dim = hop_samples, window_samples, input_dim
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
        self.embed = nn.Conv1d(input_dim, dim, _KERNEL_FRAMES, padding=_KERNEL_FRAMES // 2)
        self.blocks = nn.ModuleList([ConvNeXtBlock(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, window_samples + 2)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpectralDecoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor) -> Tensor:
        """Quantized frames `[b, f, d]` to waves `[b, 1, f * hop]`."""
        hop, num_frames = self.upsample_factor, frames.shape[1]
        if torch.is_grad_enabled() or num_frames <= _PIECE_FRAMES:
            return self._decode(frames)
        reach = (1 + len(self.blocks)) * (_KERNEL_FRAMES // 2) + -(-self.window_samples // hop)
        return torch.cat(
            [
                self._decode(frames[:, first:last])[..., own.start * hop : own.stop * hop]
                for first, last, own in _pieces(num_frames, reach)
            ],
            dim=-1,
        )

    def _decode(self, frames: Tensor) -> Tensor:
        x = rearrange(self.embed(rearrange(frames, "b f d -> b d f")), "b d f -> b f d")
        for block in self.blocks:
            x = block(x)
        head = self.head(self.norm(x))
        with torch.autocast(frames.device.type, enabled=False):
            log_magnitude, phase = rearrange(head.float(), "b f (two bins) -> two b bins f", two=2)
            spectrum = torch.polar(log_magnitude.exp().clamp(max=_MAX_MAGNITUDE), phase)
            return rearrange(self._overlap_add(spectrum), "b n -> b 1 n")

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
