"""What the rest of the library asks of an audio codec."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from audiolm_pytorch.codecs.streaming import DecoderStream, EncoderStream

__all__ = ["Codec", "StreamingCodec"]


@runtime_checkable
class Codec(Protocol):
    """A neural codec: waves to frames of discrete codes and back."""

    @property
    def target_sample_hz(self) -> int:
        """Rate of the waves (Hz)."""
        ...

    @property
    def downsample_factor(self) -> int:
        """Samples per frame."""
        ...

    @property
    def channels(self) -> int:
        """Audio channels."""
        ...

    @property
    def num_quantizers(self) -> int:
        """Codes per frame, coarse to fine; with groups, levels times groups."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes per level."""
        ...

    def fingerprint(self) -> str:
        """Hash of what the codes depend on."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Frames that cover `num_samples` samples."""
        ...

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves `[b, n]` or `[b, c, n]` to codes `[b, f, q]` int64, coarse level first; `lengths [b]` in samples."""
        ...

    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Codes `[b, f, q]` (any prefix of the levels) to waves `[b, c, n]`."""
        ...


@runtime_checkable
class StreamingCodec(Codec, Protocol):
    """A codec that also works while the sound or the codes are still coming in."""

    @property
    def encoder_latency_seconds(self) -> float:
        """How long after a sample came in the code of its frame can be known, at the most."""
        ...

    @property
    def decoder_latency_seconds(self) -> float:
        """How much sound after a frame must be known as codes before the frame can be played."""
        ...

    def encoder_stream(self) -> EncoderStream:
        """A stream from waves to codes, with a state of its own."""
        ...

    def decoder_stream(self) -> DecoderStream:
        """A stream from codes to waves, with a state of its own."""
        ...
