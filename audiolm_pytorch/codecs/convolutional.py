"""The causal convolutional encoder and decoder of SoundStream (arXiv 2107.03312, sections III-A and III-B).

The convolutions process features as images of one row, `[b, d, 1, n]`, in channels-last memory. Torch 2.13 computes 100
to 120 GMAC/s per CPU core in channels-last memory, and 60 to 100 GMAC/s if time is the last dimension in memory. Every
causal layer accepts a `StreamState`; without a state, the layer assumes silence before its input.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.networks import WaveDecoder, WaveEncoder
from audiolm_pytorch.nn.local_attention import LocalTransformer
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.nn.streaming import StreamState
from audiolm_pytorch.saving.modules import constructor_arguments, register

__all__ = ["CausalConv1d", "CausalConvTranspose1d", "ConvDecoder", "ConvEncoder", "ResidualUnit"]

_DILATIONS = (1, 3, 9)  # SoundStream, section III-A
# Initial scale of the residual branches and of the output. Units start near the identity, and the wave starts quiet.
# With the initialisation of torch the wave starts loud, and after 100 steps the model is no better than silence.
_BRANCH_SCALE, _WAVE_SCALE = 0.3, 0.05
_LOG2_E = math.log2(math.e)
# Samples per chunk outside of training. With 32 channels, a layer's output has 6 MB on a CPU; longer chunks only cause
# cache misses there, while a GPU needs more work per call.
_CHUNK_SAMPLES_CPU, _CHUNK_SAMPLES_GPU = 48_000, 1_000_000


class CausalConv1d(nn.Module):
    """A convolution padded only on the left: output step i depends on input steps up to `(i + 1) * stride - 1`."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        weight_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, (1, kernel_size), stride=(1, stride), dilation=(1, dilation))
        # This keeps the variance of the input. Torch's own initialisation shrinks it to a third per layer: after thirty
        # layers without norms, only the biases would remain.
        nn.init.normal_(self.conv.weight, std=(dim_in * kernel_size) ** -0.5)
        with torch.no_grad():
            self.conv.weight.mul_(weight_scale)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.num_past = dilation * (kernel_size - 1) + 1 - stride

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Convolve `x [b, d, 1, n]` to `[b, d', 1, n / stride]`; with a `state`, n must be a multiple of the stride."""
        if self.num_past == 0:
            return self.conv(x)
        past = None if state is None else state.past(self)
        x = F.pad(x, (self.num_past, 0)) if past is None else torch.cat([past, x], dim=-1)
        if state is not None:
            state.keep(self, x[..., -self.num_past :])
        return self.conv(x)


class CausalConvTranspose1d(nn.Module):
    """A transposed convolution with kernel size `2 * stride`, without the last `stride` output steps.

    An output step depends on two input steps, the current one and the previous one. The layer is a convolution of
    kernel size 2 that computes `stride` output steps per input step (arXiv 1609.05158), with a bias for each output
    step.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.to_steps = CausalConv1d(dim_in, stride * dim_out, 2)
        self.stride = stride

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Apply the transposed convolution to `x [b, d, 1, n]`; return `[b, d', 1, n * stride]`."""
        return rearrange(self.to_steps(x, state), "b (s d) 1 n -> b d 1 (n s)", s=self.stride)


def elu(x: Tensor, overwrite: bool = False) -> Tensor:
    """Apply ELU to `x`; if `overwrite` is True and gradients are disabled, the result can overwrite `x`.

    Without gradients on a CPU, `exp(x)` is computed as `2 ** (x log2 e)`, in half the time of `F.elu` of torch 2.13.
    With `F.elu`, a quarter of the time of the encoder is spent on ELU.
    """
    if torch.is_grad_enabled() or is_traced() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.elu(x)
    below = x.clamp(max=0).mul_(_LOG2_E).exp2_().sub_(1)
    return torch.maximum(x, below, out=x if overwrite else below)


class ResidualUnit(nn.Module):
    """Residual unit of a dilated convolution of size 7 and a convolution of size 1 (SoundStream, figure 3)."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.dilated = CausalConv1d(dim, dim, 7, dilation=dilation)
        self.pointwise = CausalConv1d(dim, dim, 1, weight_scale=_BRANCH_SCALE)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Apply the residual unit to `x [b, d, 1, n]`; the output has the same shape."""
        y = self.dilated(elu(x), state)
        return self.pointwise(elu(y, overwrite=True)).add_(x)


class _Block(nn.Module):
    """Sequence of three residual units with growing dilation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.units = nn.ModuleList([ResidualUnit(dim, dilation) for dilation in _DILATIONS])

    def forward(self, x: Tensor, state: StreamState | None) -> Tensor:
        for unit in self.units:
            x = unit(x, state)
        return x


class _ConvNetwork(nn.Module, ABC):
    """Base class of `ConvEncoder` and `ConvDecoder`, with causal convolutions and local attention between frames.

    Args:
        base_dim: Number of channels after the first convolution of the encoder and before the last convolution of the
            decoder.
        strides: Downsampling factors in the order of the encoder; their product is the number of samples per frame.
        dim: Width D of the frames.
        attn_window_size: Number of frames to which a frame attends, including itself.
        attn_depth: Number of local attention layers; the SoundStream paper has no attention.
    """

    @typed
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
        self.config = {**constructor_arguments(locals()), "strides": list(strides)}
        super().__init__()
        check_positive(channels=channels, base_dim=base_dim, strides=strides, dim=dim)
        self.channels, self._samples_per_frame = channels, math.prod(strides)
        self._build([base_dim * 2**level for level in range(len(strides) + 1)], list(strides), dim)

    @abstractmethod
    def _build(self, widths: list[int], strides: list[int], dim: int) -> None:
        """Create the layers; `widths` are the numbers of channels before the first and after every encoder stride."""

    def _attention(self, dim: int) -> LocalTransformer:
        return LocalTransformer(dim, self.config["attn_depth"], self.config["attn_window_size"])

    def _budget_frames(self) -> int:
        is_on_cpu = next(self.parameters()).device.type == "cpu"
        return max(1, (_CHUNK_SAMPLES_CPU if is_on_cpu else _CHUNK_SAMPLES_GPU) // self._samples_per_frame)


@register
class ConvEncoder(_ConvNetwork, WaveEncoder):
    """Encoder of strided causal convolutions and optional local attention; every stride doubles the channels."""

    def _build(self, widths: list[int], strides: list[int], dim: int) -> None:
        self.dim, self.downsample_factor = dim, self._samples_per_frame
        self.first = CausalConv1d(self.channels, widths[0], 7)
        self.blocks = nn.ModuleList([_Block(width) for width in widths[:-1]])
        self.downs = nn.ModuleList(
            CausalConv1d(width, 2 * width, 2 * stride, stride=stride) for width, stride in zip(widths, strides)
        )
        self.last = CausalConv1d(widths[-1], dim, 3)
        self.attention = self._attention(dim)

    def _encode(self, wave: Tensor, mask: Tensor | None, state: StreamState | None) -> Tensor:
        # clone instead of contiguous: torch counts a single channel as both layouts, only its strides differ
        x = self.first(rearrange(wave, "b c n -> b c 1 n").clone(memory_format=torch.channels_last), state)
        for block, down in zip(self.blocks, self.downs):
            x = down(elu(block(x, state), overwrite=True), state)
        x = self.last(elu(x, overwrite=True), state)
        return self.attention(rearrange(x, "b d 1 f -> b f d"), state)


@register
class ConvDecoder(_ConvNetwork, WaveDecoder):
    """Decoder of optional local attention and transposed convolutions, in the reverse order of `ConvEncoder`."""

    def _build(self, widths: list[int], strides: list[int], dim: int) -> None:
        self.input_dim, self.upsample_factor = dim, self._samples_per_frame
        widths, strides = widths[::-1], strides[::-1]
        self.attention = self._attention(dim)
        self.first = CausalConv1d(dim, widths[0], 7)
        self.ups = nn.ModuleList(
            CausalConvTranspose1d(width, width // 2, stride) for width, stride in zip(widths, strides)
        )
        self.blocks = nn.ModuleList([_Block(width) for width in widths[1:]])
        self.last = CausalConv1d(widths[-1], self.channels, 7, weight_scale=_WAVE_SCALE)

    def _decode(self, frames: Tensor, state: StreamState | None) -> Tensor:
        # this rearrangement of contiguous frames is already in channels-last memory
        x = self.first(rearrange(self.attention(frames, state), "b f d -> b d 1 f"), state)
        for up, block in zip(self.ups, self.blocks):
            x = block(up(elu(x, overwrite=True), state), state)
        return rearrange(self.last(elu(x, overwrite=True), state), "b c 1 n -> b c n")
