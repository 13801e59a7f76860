"""The interfaces of the encoder and the decoder of a codec."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.nn.streaming import FrameStream, StreamState
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["WaveDecoder", "WaveEncoder"]


class _WaveNetwork(SavedModule, ABC):
    """Base class of encoders and decoders; without gradients, long inputs are processed in chunks to limit the memory.

    `lookahead_frames` is 0 for a causal network, else the number of frames on each side that influence an output.
    """

    channels: int
    lookahead_frames: int = 0

    @abstractmethod
    def _budget_frames(self) -> int:
        """Largest number of frames in a chunk, summed over the items of the batch."""


class WaveEncoder(_WaveNetwork):
    """Encodes waves `[b, c, n]` as frames `[b, f, d]` of `downsample_factor` samples and width d = `dim`."""

    dim: int
    downsample_factor: int

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode waves `[b, c, n]`, n a multiple of `downsample_factor`; `mask [b, f]` is False for padding frames."""
        is_whole = torch.is_grad_enabled() or is_traced()
        return self._encode(wave, mask, None) if is_whole else self.stream(mask).push_last(wave)

    def stream(self, mask: Tensor | None = None) -> FrameStream:
        """Create a stream that encodes chunks `[b, c, n]` of any length; `mask [b, f]` covers the whole wave."""
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
        """Encode a whole wave or a chunk of a wave; causal layers continue from `state` and need no mask."""


class WaveDecoder(_WaveNetwork):
    """Decodes quantized frames `[b, f, d]`, d = `input_dim`, to waves of `upsample_factor` samples per frame."""

    input_dim: int
    upsample_factor: int

    def forward(self, frames: Tensor) -> Tensor:
        """Decode frames `[b, f, d]` to waves `[b, c, f * upsample_factor]`."""
        is_whole = torch.is_grad_enabled() or is_traced()
        return self._decode(frames, None) if is_whole else self.stream().push_last(frames)

    def stream(self) -> FrameStream:
        """Create a stream that decodes chunks of frames to waves."""
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
        """Decode all frames of a wave or a chunk of frames; causal layers continue from `state`."""
