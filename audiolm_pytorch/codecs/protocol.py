"""What the rest of the library asks of an audio codec."""

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Codec"]


@runtime_checkable
class Codec(Protocol):
    """A neural codec: waves to frames of discrete codes and back.

    Attributes:
        target_sample_hz: Rate of the waves it reads and writes (Hz).
        downsample_factor: Samples per frame.
        channels: Audio channels (1 mono, 2 stereo).
        num_quantizers: Code levels per frame, coarse to fine.
        codebook_size: Codes per level.
        fingerprint: Changes whenever the codes could change; stored with everything trained on them.
    """

    @property
    def target_sample_hz(self) -> int: ...
    @property
    def downsample_factor(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_quantizers(self) -> int: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def num_frames(self, num_samples: int) -> int:
        """Frames that cover `num_samples` samples."""
        ...

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves `[b, n]` or `[b, c, n]` to codes `[b, f, q]` int64, coarse level first."""
        ...

    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Codes `[b, f, q]` (any prefix of the levels) to waves `[b, c, n]`."""
        ...
