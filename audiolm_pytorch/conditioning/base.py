"""The interfaces of modules that turn texts, waves or codes into condition tensors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from audiolm_pytorch.conditioning.tensors import ConditionTensor

__all__ = ["Conditioner", "TextEncoder"]


class Conditioner(nn.Module, ABC):
    """A module that maps texts and waves to codes of one vocabulary, and embeds codes with one table per namespace.

    Every stage of a language model has its own namespace.
    """

    @property
    @abstractmethod
    def sample_hz(self) -> int:
        """Sample rate in Hz that `wavs` must have."""

    def fingerprint(self) -> str | None:
        """Hash of the weights and settings that determine the codes; None = unknown (not compared)."""
        return None

    @abstractmethod
    def codes(
        self, *, texts: str | Sequence[str] | None = None, wavs: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Return codes `[b, q]` of texts or of waves `[b, n]`; `lengths [b]` are numbers of samples without padding."""

    @abstractmethod
    def codes_from_latents(self, latents: Tensor, modality: Literal["audio", "text"] = "audio") -> Tensor:
        """Return codes `[b, q]` of precomputed latents `[b, d]` of audio or texts."""

    @abstractmethod
    def conditioning(
        self,
        *,
        texts: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        namespace: str,
    ) -> ConditionTensor:
        """Embed texts, waves `[b, n]` or codes `[b, q]`; exactly one of these arguments must be passed.

        Only the embedding table of `namespace` receives gradients.
        """

    @abstractmethod
    def table(self, namespace: str) -> nn.Module:
        """Return the trainable embedding table of a namespace, which is trained and saved with its stage."""

    @abstractmethod
    def dim(self, namespace: str) -> int:
        """Return the width of the embeddings in a namespace."""


class TextEncoder(nn.Module, ABC):
    """A frozen module that turns texts into condition tensors, with one state per token.

    Attributes:
        dim: Width of the states.
    """

    dim: int

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the weights and settings that determine the states."""

    @abstractmethod
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return states `[b, t, dim]` float32 of one or several texts, without gradients."""
