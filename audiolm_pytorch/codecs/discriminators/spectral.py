"""Discriminators of complex spectrograms."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.discriminators.base import Discriminator, ScaleOutput, leaky_relu_, run_layers
from audiolm_pytorch.saving.modules import register

__all__ = ["ComplexSTFTDiscriminator", "MultiScaleSTFTDiscriminator"]

# SoundStream, section III-D and figure 4: inner and outer channels in units of the width, and stride in (time,
# frequency), of the six residual units
_UNITS = ((1, 2, (1, 2)), (2, 4, (2, 2)), (4, 4, (1, 2)), (4, 8, (2, 2)), (8, 8, (1, 2)), (8, 16, (2, 2)))
_BINS_PER_LOGIT = 2 ** len(_UNITS)
_FRAMES_PER_LOGIT = 8


@register
class ComplexSTFTDiscriminator(Discriminator):
    """Discriminator of one complex spectrogram, with residual units (SoundStream, section III-D and figure 4).

    The STFT, the 7x7 convolution, the six residual units, and the last convolution over all remaining frequencies
    follow the SoundStream paper. Leaky ReLU, weight norm, real and imaginary parts as input channels, and strided 1x1
    convolutions as skip connections are choices of this library. The highest of the `window / 2 + 1` bins is dropped,
    because SoundStream uses `window / 2` bins. The logits `[b, 1, f]` have one value per 8 STFT frames.

    One network processes all audio channels together. The first convolution has `width` output channels, and the last
    residual unit has 16 times as many. The STFT window has a multiple of 128 samples.
    """

    @typed
    def __init__(
        self, *, channels: int = 1, width: int = 32, window_samples: int = 1024, hop_samples: int = 256
    ) -> None:
        super().__init__(dict(channels=channels, width=width, window_samples=window_samples, hop_samples=hop_samples))
        if min(channels, width, hop_samples, window_samples) < 1 or window_samples % (2 * _BINS_PER_LOGIT):
            raise ValueError(
                f"need channels, width, hop_samples >= 1 and window_samples a multiple of {2 * _BINS_PER_LOGIT}, got "
                f"{channels=}, {width=}, {hop_samples=} and {window_samples=}"
            )
        self.spectrogram = _ComplexSpectrogram(window_samples, hop_samples)
        layers: list[nn.Module] = [weight_norm(nn.Conv2d(2 * channels, width, 7, padding=3))]
        dim = width
        for inner, outer, stride in _UNITS:
            layers.append(_ResidualUnit(dim, inner * width, outer * width, stride))
            dim = outer * width
        self.layers = nn.ModuleList(layers)
        self.last = weight_norm(nn.Conv2d(dim, 1, (1, window_samples // 2 // _BINS_PER_LOGIT)))

    def _outputs(self, wave: Tensor) -> list[ScaleOutput]:
        spectrum = self.spectrogram(wave)
        # Drop the highest bin, and pad to a multiple of the strides in time.
        spectrum = F.pad(spectrum, (0, -1, 0, -spectrum.shape[2] % _FRAMES_PER_LOGIT))
        logits, features = run_layers(self.layers, self.last, spectrum)
        return [ScaleOutput(rearrange(logits, "b 1 f 1 -> b 1 f"), features)]


@register
class MultiScaleSTFTDiscriminator(Discriminator):
    """Discriminator with one network for each STFT window (EnCodec, arXiv 2210.13438, section 3.4).

    STFT windows, inputs, layers, leaky ReLU and weight norm follow the EnCodec paper. The kernel size 3x9 (3x8 in the
    paper), an additional 3x3 convolution before the last one, the slope of leaky ReLU and the normalised STFT follow
    the code of EnCodec. EnCodec processes stereo channels separately; this library processes stereo channels together,
    so that their differences influence the logits. The logits of an STFT window are `[b, 1, f, k]`, one per frame and
    per 8 frequency bins.

    `width` is the number of filters per layer. EnCodec doubles the lengths of the STFT windows at 48 kHz.
    """

    @typed
    def __init__(
        self, *, channels: int = 1, width: int = 32, windows_samples: Sequence[int] = (2048, 1024, 512, 256, 128)
    ) -> None:
        super().__init__(dict(channels=channels, width=width, windows_samples=list(windows_samples)))
        if channels < 1 or width < 1 or not windows_samples or min(windows_samples) < 4:
            raise ValueError(
                f"need channels and width >= 1 and windows of at least 4 samples, got {channels=}, {width=} and "
                f"{windows_samples=}"
            )
        self.scales = nn.ModuleList([_OneWindow(channels, width, window) for window in windows_samples])

    def _outputs(self, wave: Tensor) -> list[ScaleOutput]:
        return [scale(wave) for scale in self.scales]


class _OneWindow(nn.Module):
    """Discriminator network for one STFT window."""

    def __init__(self, channels: int, width: int, window_samples: int) -> None:
        super().__init__()
        self.spectrogram = _ComplexSpectrogram(window_samples, window_samples // 4)
        dilated = [
            nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            for dilation in (1, 2, 4)
        ]
        first = nn.Conv2d(2 * channels, width, (3, 9), padding=(1, 4))
        convs = [first, *dilated, nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.ModuleList([weight_norm(conv) for conv in convs])
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> ScaleOutput:
        return run_layers(self.layers, self.last, self.spectrogram(wave))


class _ResidualUnit(nn.Module):
    """Residual unit of a 3x3 convolution, a strided convolution and a skip connection (SoundStream, figure 4)."""

    def __init__(self, dim_in: int, dim_inner: int, dim_out: int, stride: tuple[int, int]) -> None:
        super().__init__()
        kernel = (stride[0] + 2, stride[1] + 2)
        self.inner = weight_norm(nn.Conv2d(dim_in, dim_inner, 3, padding=1))
        self.outer = weight_norm(nn.Conv2d(dim_inner, dim_out, kernel, stride=stride, padding=1))
        self.skip = weight_norm(nn.Conv2d(dim_in, dim_out, 1))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Apply the residual unit to `x [b, d, f, k]` of k frequency bins; return `[b, d', f / stride, k / stride]`."""
        # A strided 1x1 convolution of fewer than 16 channels in channels-last memory writes past its memory in backward
        # on a CPU (torch 2.13, github.com/uxlfoundation/oneDNN/issues/6035), so the stride is applied before.
        strided = x[..., :: self.stride[0], :: self.stride[1]]
        return self.outer(leaky_relu_(self.inner(x))) + self.skip(strided)


class _ComplexSpectrogram(nn.Module):
    """STFT with a Hann window, in float32 even under autocast; the STFT does not change the variance of white noise."""

    window: Tensor

    def __init__(self, window_samples: int, hop_samples: int) -> None:
        super().__init__()
        self.hop_samples = hop_samples
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Compute real and imaginary parts `[b, 2c, f, k]` of k bins of `wave [b, c, n]`; zeros extend short waves."""
        with torch.autocast(wave.device.type, enabled=False):
            window = self.window.float()
            size = len(window)
            wave = F.pad(wave.float(), (0, max(0, size // 2 + 1 - wave.shape[-1])))
            flat = rearrange(wave, "b c n -> (b c) n")
            spectrum = torch.stft(flat, size, self.hop_samples, window=window, return_complex=True)
            parts = torch.view_as_real(spectrum) / window.square().sum().sqrt()
            # contiguous, because channels-last memory (which one channel would have) is slower on a CPU in bf16
            return rearrange(parts, "(b c) k f part -> b (part c) f k", c=wave.shape[1]).contiguous()
