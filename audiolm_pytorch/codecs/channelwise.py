"""A mono codec that encodes every channel of a wave on its own."""

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.types import named, typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.saving.modules import build_module, module_spec, register

__all__ = ["ChannelwiseCodec"]


@register
class ChannelwiseCodec(Codec):
    """Codec of several channels that applies a mono codec to each channel, as the stereo models of MusicGen do.

    The codes of the channels alternate: level 1 left, level 1 right, level 2 left, and so on. A codec with scales is
    not supported.
    """

    @typed
    def __init__(self, codec: Codec, channels: int = 2) -> None:
        super().__init__()
        if codec.channels != 1 or codec.has_scales or channels < 1:
            raise ValueError(
                f"need a mono codec without scales and channels >= 1, got {codec.channels} channels, has_scales="
                f"{codec.has_scales}, and channels={channels}"
            )
        self.codec, self.channels, self.num_groups = codec, channels, channels
        self.target_sample_hz, self.downsample_factor = codec.target_sample_hz, codec.downsample_factor
        self.num_quantizers, self.codebook_size = channels * codec.num_quantizers, codec.codebook_size

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, in a form that JSON can store."""
        return {"codec": module_spec(self.codec), "channels": self.channels}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ChannelwiseCodec":
        """Build the codec from its `config`, with newly initialised weights."""
        codec: Any = build_module(config["codec"])
        return cls(codec, config["channels"])

    def fingerprint(self) -> str:
        """Fingerprint of the mono codec with the number of channels."""
        return f"{self.codec.fingerprint()}-{self.channels}"

    def num_frames(self, num_samples: int) -> int:
        """Number of frames that cover `num_samples` samples."""
        return self.codec.num_frames(num_samples)

    def decoder_stream(self) -> DecoderStream:
        """Create a stream of the mono codec that decodes all channels (see `Codec.decoder_stream`)."""
        return _ChannelwiseStream(self.codec.decoder_stream(), self)

    @named
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode waves `[b, c, n]` (see `Codec.tokenize`)."""
        wave = self._check_wave(wave, lengths)
        repeated = None if lengths is None else lengths.repeat_interleave(self.channels)
        codes = self.codec.tokenize(rearrange(wave, "b c n -> (b c) n"), repeated)
        return rearrange(codes, "(b c) f q -> b f (q c)", c=self.channels)

    @named
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Decode codes (see `Codec.decode_from_codebook_indices`); each level needs the codes of all channels."""
        waves = self.codec.decode_from_codebook_indices(self.codes_of_channels(codes), num_samples)
        return rearrange(waves, "(b c) 1 n -> b c n", c=self.channels)

    def codes_of_channels(self, codes: Tensor) -> Tensor:
        """Check codes `[b, f, q]`, and return them with each channel as an item."""
        codes = self._check_codes(codes)
        if codes.shape[-1] % self.channels:
            raise ValueError(f"codes must have a multiple of {self.channels} levels, got {codes.shape[-1]}")
        return rearrange(codes, "b f (q c) -> (b c) f q", c=self.channels)


class _ChannelwiseStream(DecoderStream):
    """Stream of a mono codec, which receives each channel as an item."""

    def __init__(self, stream: DecoderStream, codec: ChannelwiseCodec) -> None:
        self._stream, self._codec = stream, codec

    def push(self, codes: Tensor) -> Tensor:
        """Add codes `[b, f, q]`; return the samples `[b, c, n]` that later codes cannot change; n can be 0."""
        waves = self._stream.push(self._codec.codes_of_channels(codes))
        return rearrange(waves, "(b c) 1 n -> b c n", c=self._codec.channels)

    def finish(self) -> Tensor:
        """Return the remaining samples `[b, c, n]` at the end of the codes."""
        return rearrange(self._stream.finish(), "(b c) 1 n -> b c n", c=self._codec.channels)
