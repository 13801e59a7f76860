"""Decoding of a whole sequence in one call, with and without windows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from audiolm_pytorch.generation.decode_session import Decoded, DecodeSession
from audiolm_pytorch.generation.windows import SlidingWindowDecoder
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.token_batch import batches_of_streams


def decode(
    model: TokenTransformer, streams: Mapping[str, Tensor], num_frames: Mapping[str, int | Tensor], **options: Any
) -> Decoded:
    """Decode all predicted streams to their end; see `DecodeSession` for the arguments."""
    session = DecodeSession(model, streams, num_frames, **options)
    session.advance()
    return session.decoded()


def decode_in_windows(
    model: TokenTransformer,
    streams: Mapping[str, Tensor],
    num_frames: int | Tensor,
    *,
    batch_size: int = 1,
    lengths: Mapping[str, int | Tensor] | None = None,
    **options: Any,
) -> Decoded:
    """Decode the predicted stream to its end in windows; `streams` are the input streams and the prompt."""
    inputs = batches_of_streams(model.layout.streams, streams, lengths or {})
    name = model.layout.predicted[0].name
    batch = len(next(iter(streams.values()))) if streams else batch_size
    prompt = inputs.pop(name, None)
    decoder = SlidingWindowDecoder(model, num_frames, inputs=inputs, prompt=prompt, batch_size=batch, **options)
    decoder.advance()
    tokens = decoder.tokens.all()
    return Decoded({name: tokens.ids}, {name: tokens.lengths})
