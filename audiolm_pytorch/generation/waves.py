"""Acoustic tokens of items of unequal length to waves: all at once, or as they come in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec, StreamingCodec
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.nn.module_state import device_of

__all__ = ["WaveStreams", "decode_items"]


def decode_items(codec: Codec, acoustic: Sequence[Tensor], num_samples: Sequence[int]) -> list[Tensor]:
    """Decode items of unequal length; items of one length are decoded together, so that no padding is heard.

    Args:
        codec: The codec.
        acoustic: Tokens `[f_i, q]` of every item.
        num_samples: Samples wanted of every item.

    Returns:
        Waves `[n_i]`, or `[c, n_i]` of several channels.
    """
    waves: list[Tensor] = [torch.zeros(0)] * len(acoustic)
    shapes = [(len(tokens), count) for tokens, count in zip(acoustic, num_samples)]
    for shape in dict.fromkeys(shapes):
        items = [item for item, other in enumerate(shapes) if other == shape]
        codes = torch.stack([acoustic[item] for item in items]).to(device_of(codec))
        decoded = codec.decode_from_codebook_indices(codes, num_samples=shape[1])
        for item, wave in zip(items, decoded):
            waves[item] = wave[0] if len(wave) == 1 else wave
    return waves


class WaveStreams:
    """A decoder stream for every item, since items end at different times.

    Args:
        codec: The codec.
        num_samples: Samples wanted of every item at most.
    """

    def __init__(self, codec: StreamingCodec, num_samples: Sequence[int]) -> None:
        self._codec, self._left = codec, list(num_samples)
        self._streams: list[DecoderStream | None] = [codec.decoder_stream() for _ in num_samples]

    def push(self, acoustic: Sequence[Tensor], are_last: Sequence[bool]) -> list[Tensor]:
        """Take the next frames of every item.

        Args:
            acoustic: Tokens `[f_i, q]` of every item.
            are_last: Whether these are the last of an item.

        Returns:
            Waves `[n_i]`, or `[c, n_i]` of several channels, that no later frame can change.
        """
        return [self._push(item, *one) for item, one in enumerate(zip(acoustic, are_last, strict=True))]

    def _push(self, item: int, tokens: Tensor, is_last: bool) -> Tensor:
        stream, parts = self._streams[item], [torch.zeros(1, self._codec.channels, 0, device=device_of(self._codec))]
        if stream is not None and len(tokens):
            parts.append(stream.push(tokens.unsqueeze(0).to(parts[0].device)))
        if stream is not None and is_last:
            parts.append(stream.finish())
            self._streams[item] = None
        wave = torch.cat(parts, dim=-1)[0, :, : self._left[item]]
        self._left[item] -= wave.shape[-1]
        return wave[0] if len(wave) == 1 else wave
