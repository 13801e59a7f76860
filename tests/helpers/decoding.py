"""Decoding of a whole sequence in one call."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from audiolm_pytorch.generation.decode_session import Decoded, DecodeSession
from audiolm_pytorch.lm.token_model import TokenTransformer


def decode(
    model: TokenTransformer, streams: Mapping[str, Tensor], num_frames: Mapping[str, int | Tensor], **options: Any
) -> Decoded:
    """Decode all predicted streams to their end; see `DecodeSession` for the arguments."""
    session = DecodeSession(model, streams, num_frames, **options)
    session.advance()
    return session.decoded()
