"""What the rest of the library asks of an audio codec."""

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Codec"]


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
        """Code levels per frame."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes per level."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of what the codes depend on."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Frames that cover `num_samples` samples."""
        ...

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves `[b, n]` or `[b, c, n]` to codes `[b, f, q]` int64, coarse level first."""
        ...

    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Codes `[b, f, q]` (any prefix of the levels) to waves `[b, c, n]`."""
        ...
