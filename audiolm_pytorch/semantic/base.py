"""What the rest of the library asks of a semantic tokenizer, and what a tokenizer asks of the encoder under it."""

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["FrameEncoder", "SemanticTokenizer"]


@runtime_checkable
class SemanticTokenizer(Protocol):
    """Waves to one sequence of tokens for content rather than sound (AudioLM, arXiv:2209.03143, sec. III-B)."""

    @property
    def target_sample_hz(self) -> int:
        """Rate of the waves that the tokenizer works on (Hz)."""
        ...

    @property
    def downsample_factor(self) -> int:
        """Samples per token at that rate; `num_frames` is the authority on counts."""
        ...

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the tokens could change; stored with everything trained on them."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Tokens that a wave of `num_samples` samples (at `target_sample_hz`) gives."""
        ...

    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Waves `[b, n]` to ids `[b, t]` int64; positions past an item's own `num_frames` hold -1."""
        ...


@runtime_checkable
class FrameEncoder(Protocol):
    """A model whose hidden layers `KMeansTokenizer` cuts into tokens. Implementations are `nn.Module`s."""

    @property
    def sample_hz(self) -> int:
        """Rate of the waves it reads (Hz)."""
        ...

    @property
    def downsample_factor(self) -> int:
        """Samples per token at that rate; `num_frames` is the authority on counts."""
        ...

    @property
    def dim(self) -> int:
        """Width of the features."""
        ...

    @property
    def depth(self) -> int:
        """Number of its layers."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Frames that a wave of `num_samples` samples gives; ValueError when it is too short for one."""
        ...

    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Waves `[b, n]` to features `[b, t, d]` of a layer and the mask `[b, t]` of real frames."""
        ...

    def truncated(self, layer: int) -> "FrameEncoder":
        """A copy that ends after `layer`, for tokenizers that need no more."""
        ...
