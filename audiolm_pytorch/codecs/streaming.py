"""Streams of a codec that encode waves or decode codes chunk by chunk."""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from audiolm_pytorch.nn.streaming import FrameStream

__all__ = ["DecoderStream", "EncoderStream"]


class EncoderStream:
    """Encodes one wave in chunks, created by `StreamingCodec.encoder_stream`. Streams of one codec are independent.

    The function `check` checks a wave and returns it as `[b, c, n]`.
    """

    def __init__(
        self, frames: FrameStream, to_codes: Callable[[Tensor], Tensor], check: Callable[[Tensor], Tensor]
    ) -> None:
        self._frames, self._to_codes, self._check = frames, to_codes, check

    def push(self, wave: Tensor) -> Tensor:
        """Add samples `[n]`, `[b, n]` or `[b, c, n]`; return the codes `[b, f, q]` of complete frames; f can be 0."""
        return self._codes(self._check(wave), is_last=False)

    def finish(self) -> Tensor:
        """Return the remaining codes `[b, f, q]` at the end of the wave; silence fills the last frame."""
        return self._to_codes(self._frames.finish())

    def encode_checked(self, wave: Tensor) -> Tensor:
        """Encode a whole wave `[b, c, n]` without checking the wave, with limited memory."""
        return self._codes(wave, is_last=True)

    def _codes(self, wave: Tensor, is_last: bool) -> Tensor:
        return torch.cat([self._to_codes(frames) for frames in self._frames.chunks(wave, is_last)], dim=1)


class DecoderStream:
    """Decodes one sequence of codes in chunks, created by `StreamingCodec.decoder_stream`."""

    def __init__(
        self,
        waves: FrameStream,
        to_frames: Callable[[Tensor], Tensor],
        check: Callable[[Tensor], Tensor],
        check_samples: Callable[[Tensor], Tensor],
    ) -> None:
        self._waves, self._to_frames, self._check, self._check_samples = waves, to_frames, check, check_samples

    def push(self, codes: Tensor) -> Tensor:
        """Add codes `[b, f, q']`; return the samples `[b, c, n]` that later codes cannot change; n can be 0."""
        return torch.cat(list(self._chunks(self._check(codes), is_last=False)), dim=-1)

    def finish(self) -> Tensor:
        """Return the remaining samples `[b, c, n]` at the end of the codes."""
        return self._check_samples(self._waves.finish())

    def decode_checked(self, codes: Tensor) -> Tensor:
        """Decode all codes `[b, f, q']` without checking the codes, with limited memory in addition to the wave."""
        chunks = self._chunks(codes, is_last=True)
        first = next(chunks)
        # One buffer is used, because chunks and their concatenation would need more than twice the memory of the wave.
        wave = first.new_empty(*first.shape[:2], self._waves.out_steps * codes.shape[1])
        num_done = 0
        for chunk in chain([first], chunks):
            wave[..., num_done : num_done + chunk.shape[-1]] = chunk
            num_done += chunk.shape[-1]
        return wave

    @torch.no_grad()
    def _chunks(self, codes: Tensor, is_last: bool) -> Iterator[Tensor]:
        parts = codes.split(self._waves.max_frames(len(codes)), dim=1)
        for number, part in enumerate(parts, start=1):
            for wave in self._waves.chunks(self._to_frames(part), is_last and number == len(parts)):
                yield self._check_samples(wave)
