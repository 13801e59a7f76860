"""The causal convolutional encoder and decoder of SoundStream (arXiv 2107.03312, sections III-A and III-B).

Layers work on images of one row, `[b, d, 1, n]`, with the channels next to each other in memory: there, torch 2.13 on a
CPU convolves at 100 to 120 GMAC/s a core whatever the length, against 60 to 100 with time innermost. Every causal layer
takes the `StreamState` of a stream; without one it starts from silence.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.streaming import FrameStream, StreamState
from audiolm_pytorch.nn.local_attention import LocalTransformer
from audiolm_pytorch.saving.modules import register

__all__ = ["CausalConv1d", "CausalConvTranspose1d", "ConvDecoder", "ConvEncoder", "ResidualUnit"]

_DILATIONS = (1, 3, 9)  # SoundStream, section III-A
# Of the first weights: units begin near the identity, and the wave quiet, since too loud is unlearnt slowly. A clip is
# then at half the distance of silence after 100 steps; with torch's own start it is no nearer than silence.
_BRANCH_START, _WAVE_START = 0.3, 0.05
_LOG2_E = math.log2(math.e)
# Outside of training, samples that go through at once: with 32 channels a layer's output is 6 MB on a CPU, where longer
# pieces only cost cache misses; a GPU wants more work at once.
_PIECE_SAMPLES_CPU, _PIECE_SAMPLES_GPU = 48_000, 1_000_000


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
        self.conv = nn.Conv2d(dim_in, dim_out, (1, kernel_size), stride=(1, stride), dilation=(1, dilation))
        # keeps the variance of its input: torch's own start shrinks it to a third at every layer, and after thirty
        # layers without norms nothing is left of the sound but the biases
        nn.init.normal_(self.conv.weight, std=(dim_in * kernel_size) ** -0.5)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.num_past = dilation * (kernel_size - 1) + 1 - stride

    @torch.no_grad()
    def damped(self, factor: float) -> "CausalConv1d":
        """This convolution with its weights scaled down, to begin with."""
        self.conv.weight.mul_(factor)
        return self

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`[b, d, 1, n]` to `[b, d', 1, n / stride]`; with a state, n must be a multiple of the stride."""
        if self.num_past == 0:
            return self.conv(x)
        past = None if state is None else state.past(self)
        x = F.pad(x, (self.num_past, 0)) if past is None else torch.cat([past, x], dim=-1)
        if state is not None:
            state.keep(self, x[..., -self.num_past :])
        return self.conv(x)


class CausalConvTranspose1d(nn.Module):
    """A transposed convolution of kernel `2 * stride` whose tail, which would reach back in time, is cut.

    An output depends on the input step that it lies in and on the one before, so this is a convolution of two taps that
    gives `stride` output steps for each input step (as in arXiv 1609.05158, with a bias for each of them).

    Args:
        dim_in: Input channels.
        dim_out: Output channels.
        stride: Upsampling factor.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.to_steps = CausalConv1d(dim_in, stride * dim_out, 2)
        self.stride = stride

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`[b, d, 1, n]` to `[b, d', 1, n * stride]`."""
        return rearrange(self.to_steps(x, state), "b (s d) 1 n -> b d 1 (n s)", s=self.stride)


def elu(x: Tensor, overwrite: bool = False) -> Tensor:
    """ELU; with `overwrite` the result may take the place of `x`, where no gradient needs it.

    Inference on a CPU takes `2 ** (x log2 e)`: with it the whole costs half of torch 2.13's ELU, which would be a
    quarter of the encoder's time.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.elu(x)
    below = x.clamp(max=0).mul_(_LOG2_E).exp2_().sub_(1)
    return torch.maximum(x, below, out=x if overwrite else below)


class ResidualUnit(nn.Module):
    """Dilated kernel-7 and kernel-1 convolutions around a skip (SoundStream, fig. 3).

    Args:
        dim: Channels.
        dilation: Of the first convolution (1, 3 and 9 in the paper).
    """

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.dilated = CausalConv1d(dim, dim, 7, dilation=dilation)
        self.pointwise = CausalConv1d(dim, dim, 1).damped(_BRANCH_START)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`[b, d, 1, n]` to `[b, d, 1, n]`."""
        y = self.dilated(elu(x), state)
        return self.pointwise(elu(y, overwrite=True)).add_(x)


class _Block(nn.Module):
    """Three residual units of growing dilation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.units = nn.ModuleList([ResidualUnit(dim, dilation) for dilation in _DILATIONS])

    def forward(self, x: Tensor, state: StreamState | None) -> Tensor:
        for unit in self.units:
            x = unit(x, state)
        return x


def _budget_frames(module: nn.Module, samples_per_frame: int) -> int:
    """Frames that go through a network at once outside of training."""
    is_on_cpu = next(module.parameters()).device.type == "cpu"
    return max(1, (_PIECE_SAMPLES_CPU if is_on_cpu else _PIECE_SAMPLES_GPU) // samples_per_frame)


@register
class ConvEncoder(nn.Module):
    """Strided causal convolutions that double the channels at every stride, and local attention if wanted.

    Args:
        channels: Audio channels in.
        base_dim: C_enc of the paper: channels after the first convolution (32 there).
        strides: Downsampling of each block; their product is the samples per frame.
        dim: Width D of the frames that come out.
        attn_window_size: Frames that a frame sees in the attention (itself and those before).
        attn_depth: Blocks of attention after the convolutions; the paper has none.
    """

    lookahead_frames = 0

    @beartype
    def __init__(
        self,
        *,
        channels: int = 1,
        base_dim: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        dim: int = 512,
        attn_window_size: int = 128,
        attn_depth: int = 0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            channels=channels,
            base_dim=base_dim,
            strides=list(strides),
            dim=dim,
            attn_window_size=attn_window_size,
            attn_depth=attn_depth,
        )
        self.channels, self.dim, self.downsample_factor = channels, dim, math.prod(strides)
        widths = [base_dim * 2**level for level in range(len(strides) + 1)]
        self.first = CausalConv1d(channels, base_dim, 7)
        self.blocks = nn.ModuleList([_Block(width) for width in widths[:-1]])
        self.downs = nn.ModuleList(
            CausalConv1d(width, 2 * width, 2 * stride, stride=stride) for width, stride in zip(widths, strides)
        )
        self.last = CausalConv1d(widths[-1], dim, 3)
        self.attention = LocalTransformer(dim, attn_depth, attn_window_size)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ConvEncoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waves `[b, c, n]` with n a multiple of the strides' product to frames `[b, f, d]`.

        `mask [b, f]` is there for encoders that look ahead; a causal one cannot see padding on the right.
        """
        return self._encode(wave) if torch.is_grad_enabled() else self.stream().whole(wave)

    def stream(self, mask: Tensor | None = None) -> FrameStream:
        """A stream of waves `[b, c, n]` (any n) to frames `[b, f, d]`; `mask` as in `forward`."""
        state = StreamState()
        return FrameStream(
            lambda wave, first_frame: self._encode(wave, state),
            in_axis=-1,
            in_steps=self.downsample_factor,
            out_axis=1,
            out_steps=1,
            out_width=self.dim,
            reach_frames=0,
            budget_frames=_budget_frames(self, self.downsample_factor),
        )

    def _encode(self, wave: Tensor, state: StreamState | None = None) -> Tensor:
        # clone, not contiguous: a single channel counts as both layouts, and only strides tell torch which is meant
        x = self.first(rearrange(wave, "b c n -> b c 1 n").clone(memory_format=torch.channels_last), state)
        for block, down in zip(self.blocks, self.downs):
            x = down(elu(block(x, state), overwrite=True), state)
        x = self.last(elu(x, overwrite=True), state)
        return self.attention(rearrange(x, "b d 1 f -> b f d"), state)


@register
class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`.

    Args:
        channels: Audio channels out.
        base_dim: C_dec of the paper: channels before the last convolution.
        strides: The encoder's strides; they are undone in reverse order.
        dim: Width D of the frames that go in.
        attn_window_size: Frames that a frame sees in the attention (itself and those before).
        attn_depth: Blocks of attention before the convolutions; the paper has none.
    """

    lookahead_frames = 0

    @beartype
    def __init__(
        self,
        *,
        channels: int = 1,
        base_dim: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        dim: int = 512,
        attn_window_size: int = 128,
        attn_depth: int = 0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            channels=channels,
            base_dim=base_dim,
            strides=list(strides),
            dim=dim,
            attn_window_size=attn_window_size,
            attn_depth=attn_depth,
        )
        self.channels, self.input_dim, self.upsample_factor = channels, dim, math.prod(strides)
        widths = [base_dim * 2**level for level in range(len(strides), -1, -1)]
        self.attention = LocalTransformer(dim, attn_depth, attn_window_size)
        self.first = CausalConv1d(dim, widths[0], 7)
        self.ups = nn.ModuleList(
            CausalConvTranspose1d(width, width // 2, stride) for width, stride in zip(widths, reversed(strides))
        )
        self.blocks = nn.ModuleList([_Block(width) for width in widths[1:]])
        self.last = CausalConv1d(widths[-1], channels, 7).damped(_WAVE_START)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ConvDecoder":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor) -> Tensor:
        """Quantized frames `[b, f, d]` to waves `[b, c, n]`."""
        return self._decode(frames) if torch.is_grad_enabled() else self.stream().whole(frames)

    def stream(self) -> FrameStream:
        """A stream of quantized frames `[b, f, d]` to waves `[b, c, n]`."""
        state = StreamState()
        return FrameStream(
            lambda frames, first_frame: self._decode(frames, state),
            in_axis=1,
            in_steps=1,
            out_axis=-1,
            out_steps=self.upsample_factor,
            out_width=self.channels,
            reach_frames=0,
            budget_frames=_budget_frames(self, self.upsample_factor),
        )

    def _decode(self, frames: Tensor, state: StreamState | None = None) -> Tensor:
        # frames of contiguous values are an image with its channels innermost
        x = self.first(rearrange(self.attention(frames, state), "b f d -> b d 1 f"), state)
        for up, block in zip(self.ups, self.blocks):
            x = block(up(elu(x, overwrite=True), state), state)
        return rearrange(self.last(elu(x, overwrite=True), state), "b c 1 n -> b c n")
