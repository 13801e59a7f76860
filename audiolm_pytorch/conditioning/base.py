"""The interfaces of modules that turn texts, waves or codes into condition tensors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from audiolm_pytorch.conditioning.tensors import ConditionTensor

__all__ = ["Conditioner", "TextEncoder"]


class Conditioner(nn.Module, ABC):
    """A module that describes texts and waves by the same codes, and embeds codes with one table per namespace.

    Every stage of a language model has its own namespace.
    """

    @property
    @abstractmethod
    def sample_hz(self) -> int:
        """Sample rate of the waves."""

    def fingerprint(self) -> str | None:
        """Hash of everything that the codes depend on; None = unknown, then nothing is compared."""
        return None

    @abstractmethod
    def codes(
        self, *, texts: str | Sequence[str] | None = None, wavs: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Return the codes `[b, q]` of either texts or waves `[b, n]` with true lengths `[b]` in samples."""

    @abstractmethod
    def codes_from_latents(self, latents: Tensor, modality: Literal["audio", "text"] = "audio") -> Tensor:
        """Return the codes `[b, q]` of precomputed latents `[b, d]` of audio or texts."""

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
        """Embed exactly one of texts, waves `[b, n]` (with true lengths `[b]`) and codes `[b, q]`.

        Only the table of the namespace receives gradients.
        """

    @abstractmethod
    def table(self, namespace: str) -> nn.Module:
        """Return the trainable embedding table of a namespace, which is trained and saved with its stage."""

    @abstractmethod
    def dim(self, namespace: str) -> int:
        """Width of the embeddings of a namespace."""


class TextEncoder(nn.Module, ABC):
    """A frozen module that turns texts into condition tensors, with one state per token.

    Attributes:
        dim: Width of the states.
    """

    dim: int

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that the states depend on."""

    @abstractmethod
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return the states `[b, t, dim]` float32 of one text or several, without gradients."""
