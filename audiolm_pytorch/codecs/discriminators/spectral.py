"""Discriminators of complex spectrograms."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from audiolm_pytorch.codecs.discriminators.scales import ScaleOutput, activated, checked, judge
from audiolm_pytorch.saving.modules import register

__all__ = ["ComplexSTFTDiscriminator", "MultiScaleSTFTDiscriminator"]

# SoundStream, section III-D and figure 4: (inner channels, outer channels) in units of the width, stride in (time,
# frequency) of the six residual units
_UNITS = (
    (1, 2, (1, 2)),
    (2, 4, (2, 2)),
    (4, 4, (1, 2)),
    (4, 8, (2, 2)),
    (8, 8, (1, 2)),
    (8, 16, (2, 2)),
)
_BINS_PER_LOGIT = 2 ** len(_UNITS)
_FRAMES_PER_LOGIT = 8


@register
class ComplexSTFTDiscriminator(nn.Module):
    """Residual units over the complex spectrogram at one resolution (SoundStream, section III-D and figure 4).

    From the paper: the window and hop, a 7x7 convolution, six residual units that alternate strides (1, 2) and (2, 2)
    in (time, frequency), each a 3x3 and a strided 3x4 or 4x4 convolution, their channels, and a last convolution over
    all frequencies that are left. Not from it: leaky ReLU and weight norm (as in the wave discriminator), real and
    imaginary parts as input channels, a 1x1 convolution as the skip, which has to change shape. Of the `window / 2 + 1`
    bins the highest is left out, since the paper counts `window / 2`.

    Args:
        channels: Audio channels; they are seen together.
        width: Channels C after the first convolution; the last unit has 16 times as many.
        window_samples: Of the STFT; a multiple of 128.
        hop_samples: Between frames.

    Raises:
        ValueError: If a number is out of range.
    """

    @beartype
    def __init__(
        self, *, channels: int = 1, width: int = 32, window_samples: int = 1024, hop_samples: int = 256
    ) -> None:
        super().__init__()
        if min(channels, width, hop_samples, window_samples) < 1 or window_samples % (2 * _BINS_PER_LOGIT):
            raise ValueError(
                f"need channels, width, hop_samples >= 1 and window_samples a multiple of {2 * _BINS_PER_LOGIT} (its "
                f"bins are halved {len(_UNITS)} times); got {channels}, {width}, {hop_samples} and {window_samples}"
            )
        self.config: dict[str, Any] = dict(
            channels=channels, width=width, window_samples=window_samples, hop_samples=hop_samples
        )
        self.channels = channels
        self.spectrogram = _ComplexSpectrogram(window_samples, hop_samples)
        layers: list[nn.Module] = [weight_norm(nn.Conv2d(2 * channels, width, 7, padding=3))]
        dim = width
        for inner, outer, stride in _UNITS:
            layers.append(_ResidualUnit(dim, inner * width, outer * width, stride))
            dim = outer * width
        self.layers = nn.ModuleList(layers)
        self.last = weight_norm(nn.Conv2d(dim, 1, (1, window_samples // 2 // _BINS_PER_LOGIT)))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ComplexSTFTDiscriminator":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, wave: Tensor) -> list[ScaleOutput]:
        """Judge waves.

        Args:
            wave: `[b, c, n]`, any n > 0.

        Returns:
            One scale, with logits `[b, 1, f]`: one for each 8 frames of the spectrogram, rounded up.

        Raises:
            ValueError: If the wave is empty or has other channels.
        """
        spectrum = self.spectrogram(checked(wave, self.channels))
        # one bin less, and as many frames as the strides divide
        spectrum = F.pad(spectrum, (0, -1, 0, -spectrum.shape[2] % _FRAMES_PER_LOGIT))
        logits, features = judge(self.layers, self.last, spectrum)
        return [ScaleOutput(rearrange(logits, "b 1 f 1 -> b 1 f"), features)]


@register
class MultiScaleSTFTDiscriminator(nn.Module):
    """The same network on complex spectrograms of several windows (EnCodec, arXiv 2210.13438, section 3.4).

    From the paper: windows, real and imaginary parts as input channels, 32 filters in every layer, one convolution,
    three with dilations 1, 2, 4 in time and stride 2 in frequency, a 3x3 one for the logits, leaky ReLU, weight norm.
    From their published code: kernels 3x9 (3x8 in the text), one 3x3 convolution more before the last, the slope, and
    the normalised STFT. Hops are a quarter of the window. The paper judges the channels of stereo separately and
    doubles the windows at 48 kHz; here the channels are seen together, so that their differences count, and the windows
    are an argument.

    Args:
        channels: Audio channels.
        width: Filters of every layer.
        windows_samples: Of the STFTs; hops are a quarter.

    Raises:
        ValueError: If a number is out of range.
    """

    @beartype
    def __init__(
        self,
        *,
        channels: int = 1,
        width: int = 32,
        windows_samples: Sequence[int] = (2048, 1024, 512, 256, 128),
    ) -> None:
        super().__init__()
        if channels < 1 or width < 1 or not windows_samples or min(windows_samples) < 4:
            raise ValueError(
                f"need channels and width >= 1 and windows of 4 samples or more, got {channels}, {width} and "
                f"{tuple(windows_samples)}"
            )
        self.config: dict[str, Any] = dict(channels=channels, width=width, windows_samples=list(windows_samples))
        self.channels = channels
        self.scales = nn.ModuleList([_OneWindow(channels, width, window) for window in windows_samples])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MultiScaleSTFTDiscriminator":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, wave: Tensor) -> list[ScaleOutput]:
        """Judge waves.

        Args:
            wave: `[b, c, n]`, any n > 0.

        Returns:
            For each window: logits `[b, 1, f, k]`, one for each frame and 8 bins.

        Raises:
            ValueError: If the wave is empty or has other channels.
        """
        wave = checked(wave, self.channels)
        return [scale(wave) for scale in self.scales]


class _OneWindow(nn.Module):
    """The network of one window."""

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
        return judge(self.layers, self.last, self.spectrogram(wave))


class _ResidualUnit(nn.Module):
    """A 3x3 and a strided convolution around a strided 1x1 one (SoundStream, figure 4)."""

    def __init__(self, dim_in: int, dim_inner: int, dim_out: int, stride: tuple[int, int]) -> None:
        super().__init__()
        kernel = (stride[0] + 2, stride[1] + 2)
        self.inner = weight_norm(nn.Conv2d(dim_in, dim_inner, 3, padding=1))
        self.outer = weight_norm(nn.Conv2d(dim_inner, dim_out, kernel, stride=stride, padding=1))
        self.skip = weight_norm(nn.Conv2d(dim_in, dim_out, 1))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`[b, d, f, k]` to `[b, d', f / stride, k / stride]`."""
        # the stride is taken before the 1x1 convolution: of fewer than 16 channels in channels-last memory, a strided
        # one writes past its memory in backward on a CPU (torch 2.13, github.com/uxlfoundation/oneDNN/issues/6035)
        strided = x[..., :: self.stride[0], :: self.stride[1]]
        return self.outer(activated(self.inner(x))) + self.skip(strided)


class _ComplexSpectrogram(nn.Module):
    """STFT with a Hann window as real channels, in float32 under autocast too; white noise keeps its variance."""

    window: Tensor

    def __init__(self, window_samples: int, hop_samples: int) -> None:
        super().__init__()
        self.hop_samples = hop_samples
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """`[b, c, n]` to `[b, 2c, f, k]`: f frames centred on every hop, k bins; silence is added to short waves."""
        with torch.autocast(wave.device.type, enabled=False):
            window = self.window.float()
            size = len(window)
            wave = F.pad(wave.float(), (0, max(0, size // 2 + 1 - wave.shape[-1])))
            flat = rearrange(wave, "b c n -> (b c) n")
            spectrum = torch.stft(flat, size, self.hop_samples, window=window, return_complex=True)
            parts = torch.view_as_real(spectrum) / window.square().sum().sqrt()
            # contiguous: channels-last memory, which this would be for one channel, is slower on a CPU in bf16
            return rearrange(parts, "(b c) k f part -> b (part c) f k", c=wave.shape[1]).contiguous()
