"""Decoding of acoustic tokens to waves, for items of different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec, StreamingCodec
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.nn.module_state import device_of

__all__ = ["WaveStreams", "decode_items"]


def decode_items(codec: Codec, acoustic: Sequence[Tensor], num_samples: Sequence[int]) -> list[Tensor]:
    """Decode tokens `[f_i, q]` of items to waves `[n_i]`, or `[c, n_i]` for a codec of several channels.

    Items of equal length are decoded in one batch, so that padding does not change the result.
    """
    waves: list[Tensor] = [torch.zeros(0)] * len(acoustic)
    sizes = [(len(tokens), count) for tokens, count in zip(acoustic, num_samples)]
    for size in dict.fromkeys(sizes):
        items = [item for item, item_size in enumerate(sizes) if item_size == size]
        codes = torch.stack([acoustic[item] for item in items]).to(device_of(codec))
        decoded = codec.decode_from_codebook_indices(codes, num_samples=size[1])
        for item, wave in zip(items, decoded):
            waves[item] = wave[0] if len(wave) == 1 else wave
    return waves


class WaveStreams:
    """Decoder streams of a codec, one per item, because items end at different times.

    Args:
        codec: A codec with a `decoder_stream`.
        num_samples: Maximum number of samples of every item.
    """

    def __init__(self, codec: StreamingCodec, num_samples: Sequence[int]) -> None:
        self._codec, self._remaining_samples = codec, list(num_samples)
        self._streams: list[DecoderStream | None] = [codec.decoder_stream() for _ in num_samples]

    def push(self, acoustic: Sequence[Tensor], are_last: Sequence[bool]) -> list[Tensor]:
        """Decode the next tokens `[f_i, q]` of every item. A later call returns samples that depend on later tokens.

        Args:
            acoustic: Next tokens of every item.
            are_last: For every item, whether these tokens are its last ones.

        Returns:
            Waves `[n_i]`, or `[c, n_i]` for a codec of several channels.
        """
        return [self._push(item, *pair) for item, pair in enumerate(zip(acoustic, are_last, strict=True))]

    def _push(self, item: int, tokens: Tensor, is_last: bool) -> Tensor:
        stream, parts = self._streams[item], [torch.zeros(1, self._codec.channels, 0, device=device_of(self._codec))]
        if stream is not None and len(tokens):
            parts.append(stream.push(tokens.unsqueeze(0).to(parts[0].device)))
        if stream is not None and is_last:
            parts.append(stream.finish())
            self._streams[item] = None
        wave = torch.cat(parts, dim=-1)[0, :, : self._remaining_samples[item]]
        self._remaining_samples[item] -= wave.shape[-1]
        return wave[0] if len(wave) == 1 else wave
