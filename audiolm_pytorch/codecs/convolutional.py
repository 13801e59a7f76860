"""The causal convolutional encoder and decoder of SoundStream (arXiv 2107.03312, sections III-A and III-B)."""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.io import register

__all__ = ["CausalConv1d", "CausalConvTranspose1d", "ConvDecoder", "ConvEncoder", "ResidualUnit"]


class CausalConv1d(nn.Module):
    """A convolution whose output at step i depends on inputs up to step i only: all padding is on the left.

    Args:
        dim_in: Input channels.
        dim_out: Output channels.
        kernel_size: Taps.
        stride: Output step i ends at input step `(i + 1) * stride - 1`.
        dilation: Spacing of the taps.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim_in, dim_out, kernel_size, stride=stride, dilation=dilation)
        self.left_padding = dilation * (kernel_size - 1) + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        """`[b, d, n]` to `[b, d', n / stride]`."""
        return self.conv(F.pad(x, (self.left_padding, 0)))


class CausalConvTranspose1d(nn.Module):
    """A transposed convolution of kernel `2 * stride` whose tail, which would reach back in time, is cut.

    Args:
        dim_in: Input channels.
        dim_out: Output channels.
        stride: Upsampling factor.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim_in, dim_out, 2 * stride, stride=stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`[b, d, n]` to `[b, d', n * stride]`."""
        return self.conv(x)[..., : x.shape[-1] * self.stride]


class ResidualUnit(nn.Module):
    """Dilated kernel-7 and kernel-1 convolutions around a skip (SoundStream, fig. 3).

    Args:
        dim: Channels.
        dilation: Of the first convolution (1, 3 and 9 in the paper).
    """

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ELU(), CausalConv1d(dim, dim, 7, dilation=dilation), nn.ELU(), CausalConv1d(dim, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[b, d, n]` to `[b, d, n]`."""
        return x + self.layers(x)


_DILATIONS = (1, 3, 9)  # SoundStream, section III-A


@register
class ConvEncoder(nn.Module):
    """Strided causal convolutions that double the channels at every stride.

    Args:
        channels: Audio channels in.
        base_dim: C_enc of the paper: channels after the first convolution (32 there).
        strides: Downsampling of each block; their product is the samples per frame.
        dim: Width D of the frames that come out.
    """

    @beartype
    def __init__(
        self, *, channels: int = 1, base_dim: int = 32, strides: Sequence[int] = (2, 4, 5, 8), dim: int = 512
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(channels=channels, base_dim=base_dim, strides=list(strides), dim=dim)
        self.dim, self.downsample_factor = dim, math.prod(strides)
        layers: list[nn.Module] = [CausalConv1d(channels, base_dim, 7)]
        width = base_dim
        for stride in strides:
            layers += [ResidualUnit(width, dilation) for dilation in _DILATIONS]
            layers += [nn.ELU(), CausalConv1d(width, width * 2, 2 * stride, stride=stride)]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.ELU(), CausalConv1d(width, dim, 3))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ConvEncoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waves `[b, c, n]` with n a multiple of the strides' product to frames `[b, f, d]`.

        `mask [b, f]` is there for encoders that look ahead; a causal one cannot see padding on the right.
        """
        return rearrange(self.layers(wave), "b d f -> b f d")


@register
class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`.

    Args:
        channels: Audio channels out.
        base_dim: C_dec of the paper: channels before the last convolution.
        strides: The encoder's strides; they are undone in reverse order.
        dim: Width D of the frames that go in.
    """

    @beartype
    def __init__(
        self, *, channels: int = 1, base_dim: int = 32, strides: Sequence[int] = (2, 4, 5, 8), dim: int = 512
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(channels=channels, base_dim=base_dim, strides=list(strides), dim=dim)
        self.input_dim, self.upsample_factor = dim, math.prod(strides)
        width = base_dim * 2 ** len(strides)
        layers: list[nn.Module] = [CausalConv1d(dim, width, 7)]
        for stride in reversed(strides):
            layers += [nn.ELU(), CausalConvTranspose1d(width, width // 2, stride)]
            width //= 2
            layers += [ResidualUnit(width, dilation) for dilation in _DILATIONS]
        self.layers = nn.Sequential(*layers, nn.ELU(), CausalConv1d(width, channels, 7))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ConvDecoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor) -> Tensor:
        """Quantized frames `[b, f, d]` to waves `[b, c, n]`."""
        return self.layers(rearrange(frames, "b f d -> b d f"))
