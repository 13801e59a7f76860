"""The base class of discriminators, and functions that several discriminators use."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.checks.types import keep_arguments
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["Discriminator", "ScaleOutput", "leaky_relu_", "run_layers"]

_SLOPE = 0.2  # MelGAN (arXiv 1910.06711, appendix A) and EnCodec's published discriminator


class ScaleOutput(NamedTuple):
    """Logits `[b, 1, ...]` of a discriminator at one scale, and outputs `[b, d, ...]` of all layers except the last.

    Positive logits classify audio as real.
    """

    logits: Tensor
    features: list[Tensor]


class Discriminator(SavedModule, ABC):
    """Base class of discriminators with one or several scales, such as resolutions or STFT windows."""

    channels: int

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        keep_arguments(self, config)

    def forward(self, wave: Tensor) -> list[ScaleOutput]:
        """Compute the outputs of all scales for waves `[b, c, n]` with any n > 0."""
        if wave.ndim != 3 or wave.shape[1] != self.channels or wave.shape[2] == 0:
            raise ValueError(
                f"waves must be [b, {self.channels}, n] with n > 0, got shape {tuple(wave.shape)}; create the "
                "discriminator with the `channels` of the waves"
            )
        return self._outputs(wave)

    @abstractmethod
    def _outputs(self, wave: Tensor) -> list[ScaleOutput]:
        """Compute the outputs of all scales for waves `[b, c, n]`, whose shape `forward` checked."""


def run_layers(layers: Iterable[nn.Module], last: nn.Module, x: Tensor) -> ScaleOutput:
    """Run layers, each with a leaky ReLU, then the last layer; the features are the outputs of the leaky ReLUs."""
    features = []
    x = x.to(next(last.parameters()).dtype)
    for layer in layers:
        x = leaky_relu_(layer(x))
        features.append(x)
    return ScaleOutput(last(x), features)


def leaky_relu_(x: Tensor) -> Tensor:
    """Apply leaky ReLU in place to a convolution's output, which the backward pass of the convolution does not need."""
    return F.leaky_relu(x, _SLOPE, inplace=True)
