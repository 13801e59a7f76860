"""The interfaces of modules that turn texts, waves or codes into condition tensors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from audiolm_pytorch.conditioning.tensors import ConditionTensor

__all__ = ["Conditioner", "TextEncoder"]


class Conditioner(nn.Module, ABC):
    """Base class of conditioners, which turn texts or waves into integer codes and embed the codes for language models.

    A conditioner has one embedding table per language model stage; `namespace` is the name of the stage.
    """

    @property
    @abstractmethod
    def sample_hz(self) -> int:
        """Sample rate in Hz of the waves that the conditioner accepts."""

    def fingerprint(self) -> str | None:
        """Return a hash of the weights and settings that determine the codes, or None if no hash is available."""
        return None

    @abstractmethod
    def codes(
        self, *, texts: str | Sequence[str] | None = None, wavs: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Return codes `[b, q]` of texts or waves `[b, n]`; `lengths [b]` are unpadded wave lengths in samples."""

    @abstractmethod
    def codes_from_latents(self, latents: Tensor, modality: Literal["audio", "text"] = "audio") -> Tensor:
        """Quantize precomputed embeddings `[b, d]` of audio or texts to codes `[b, q]`."""

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
        """Return the condition tensor of `texts`, `wavs [b, n]` or `codes [b, q]`, of which only one may be passed.

        Only the embedding table that `namespace` selects receives gradients.
        """

    @abstractmethod
    def table(self, namespace: str) -> nn.Module:
        """Return the embedding table of a namespace, which is trained and saved with its language model stage."""

    @abstractmethod
    def dim(self, namespace: str) -> int:
        """Return the width of the embeddings in the table of a namespace."""


class TextEncoder(nn.Module, ABC):
    """Base class of frozen text encoders, which return one hidden state per text token as a condition tensor.

    Attributes:
        dim: Width of the hidden states.
    """

    dim: int

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the weights and settings that determine the hidden states."""

    @abstractmethod
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return hidden states `[b, t, dim]` float32 of one or several texts, without gradients."""
