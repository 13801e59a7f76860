"""Decoding of EnCodec chunk by chunk: convolutions with their neighbouring frames, and LSTMs with their state."""

from collections.abc import Callable
from itertools import groupby
from math import ceil
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.pretrained.chunked import CHUNK_SAMPLES, span_of
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.nn.streaming import FrameStream

__all__ = ["EncodecDecoderStream"]


class EncodecDecoderStream(DecoderStream):
    """Stream of an EnCodec without segments. The results equal those of `decode` up to rounding errors.

    Args:
        model: The `EncodecModel` of transformers.
        check: Function that checks codes and returns them.
    """

    def __init__(self, model: Any, check: Callable[[Tensor], Tensor]) -> None:
        self._quantizer, self._check = model.quantizer, check
        self._stages: list[FrameStream | _RecurrentStream] = []
        width = model.config.hidden_size
        for is_recurrent, group in groupby(model.decoder.layers, lambda layer: hasattr(layer, "lstm")):
            layers = list(group)
            if is_recurrent:
                self._stages += [_RecurrentStream(layer.lstm) for layer in layers]
                continue
            span, run = span_of(layers), nn.Sequential(*layers)
            width = next(layer.conv.out_channels for layer in reversed(layers) if hasattr(layer, "conv"))
            self._stages.append(
                FrameStream(
                    lambda chunk, first_frame, run=run: run(chunk),  # type: ignore[misc]
                    in_axis=2,
                    in_steps=1,
                    out_axis=2,
                    out_steps=span.scale.denominator,
                    out_width=width,
                    reach_frames=ceil(span.reach) + 1,
                    budget_frames=max(1, CHUNK_SAMPLES // span.scale.denominator),
                )
            )

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """Add codes `[b, f, q]`; return the samples `[b, c, n]` that later codes cannot change; n can be 0."""
        hidden: Tensor = self._quantizer.decode(rearrange(self._check(codes), "b f q -> q b f"))
        for stage in self._stages:
            hidden = stage.push(hidden)
        return hidden

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Return the remaining samples `[b, c, n]` at the end of the codes."""
        hidden: Tensor | None = None
        for stage in self._stages:
            hidden = stage.finish() if hidden is None else stage.push_last(hidden)
        return torch.zeros(1, 1, 0) if hidden is None else hidden


class _RecurrentStream:
    """An LSTM with a residual connection that keeps its state between chunks `[b, d, f]`."""

    def __init__(self, lstm: nn.LSTM) -> None:
        self._lstm = lstm
        self._state: tuple[Tensor, Tensor] | None = None

    def push(self, x: Tensor) -> Tensor:
        """Return the outputs of the frames of a chunk, which may be empty."""
        if not x.shape[2]:
            return x
        rows = rearrange(x, "b d f -> f b d")
        out, self._state = self._lstm(rows, self._state)
        return rearrange(out + rows, "f b d -> b d f")

    push_last = push

    def finish(self) -> Tensor:
        """Raise an error, because a decoder does not begin with an LSTM."""
        raise ValueError("the decoder begins with an LSTM, which cannot be streamed")
