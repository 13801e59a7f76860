"""The interfaces of a codec's encoder and decoder."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from audiolm_pytorch.nn.streaming import FrameStream, StreamState

__all__ = ["WaveDecoder", "WaveEncoder"]


class WaveEncoder(nn.Module, ABC):
    """Encodes waves `[b, c, n]` as frames `[b, f, d]`; without gradients in chunks, so that memory is bounded.

    Attributes:
        channels: Audio channels.
        dim: Width d of the frames.
        downsample_factor: Samples per frame.
        lookahead_frames: Frames on either side that a frame depends on; 0 for a causal encoder with a state.
    """

    channels: int
    dim: int
    downsample_factor: int
    lookahead_frames: int = 0

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode `[b, c, n]` with n a multiple of `downsample_factor`; `mask [b, f]` is True for real frames."""
        return self._encode(wave, mask, None) if torch.is_grad_enabled() else self.stream(mask).push_last(wave)

    def stream(self, mask: Tensor | None = None) -> FrameStream:
        """A stream of waves `[b, c, n]` (any n) to frames; `mask [b, f]` is that of the whole wave."""
        state = StreamState()

        def run(wave: Tensor, first_frame: int) -> Tensor:
            last_frame = first_frame + wave.shape[-1] // self.downsample_factor
            return self._encode(wave, None if mask is None else mask[:, first_frame:last_frame], state)

        return FrameStream(
            run,
            in_axis=-1,
            in_steps=self.downsample_factor,
            out_axis=1,
            out_steps=1,
            out_width=self.dim,
            reach_frames=self.lookahead_frames,
            budget_frames=self._budget_frames(),
        )

    @abstractmethod
    def _encode(self, wave: Tensor, mask: Tensor | None, state: StreamState | None) -> Tensor:
        """Encode a wave or a chunk of it; causal layers continue from `state` and need no mask."""

    @abstractmethod
    def _budget_frames(self) -> int:
        """Frames per chunk, summed over the batch."""


class WaveDecoder(nn.Module, ABC):
    """Decodes quantized frames `[b, f, d]` to waves `[b, c, n]`; without gradients in chunks.

    Attributes:
        channels: Audio channels.
        input_dim: Width d of the frames.
        upsample_factor: Samples per frame.
        lookahead_frames: Frames on either side that a frame depends on; 0 for a causal decoder with a state.
    """

    channels: int
    input_dim: int
    upsample_factor: int
    lookahead_frames: int = 0

    def forward(self, frames: Tensor) -> Tensor:
        """Decode `[b, f, d]` to `[b, c, f * upsample_factor]`."""
        return self._decode(frames, None) if torch.is_grad_enabled() else self.stream().push_last(frames)

    def stream(self) -> FrameStream:
        """A stream of frames to waves."""
        state = StreamState()
        return FrameStream(
            lambda frames, first_frame: self._decode(frames, state),
            in_axis=1,
            in_steps=1,
            out_axis=-1,
            out_steps=self.upsample_factor,
            out_width=self.channels,
            reach_frames=self.lookahead_frames,
            budget_frames=self._budget_frames(),
        )

    @abstractmethod
    def _decode(self, frames: Tensor, state: StreamState | None) -> Tensor:
        """Decode all frames or a chunk of them; causal layers continue from `state`."""

    @abstractmethod
    def _budget_frames(self) -> int:
        """Frames per chunk, summed over the batch."""
