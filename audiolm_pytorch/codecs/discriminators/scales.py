"""What every discriminator gives back, and several of them as one."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.saving.modules import build_module, module_spec, register

__all__ = ["Discriminators", "ScaleOutput", "activated", "checked", "judge"]

_SLOPE = 0.2  # MelGAN (arXiv 1910.06711, appendix A) and EnCodec's published discriminator


class ScaleOutput(NamedTuple):
    """What a discriminator thinks of a wave at one scale.

    Attributes:
        logits: `[b, 1, ...]`, positive where the wave seems real.
        features: Outputs `[b, d, ...]` of all layers before the last.
    """

    logits: Tensor
    features: list[Tensor]


@register
class Discriminators(nn.Module):
    """Several discriminators that are called as one.

    Args:
        parts: Modules that turn waves `[b, c, n]` into a list of `ScaleOutput`.

    Raises:
        ValueError: If there is none.
    """

    @beartype
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts is empty; give at least one discriminator")
        self.parts = nn.ModuleList(parts)

    @property
    def config(self) -> dict[str, Any]:
        """Classes and configs of the parts."""
        return {"parts": [module_spec(part) for part in self.parts]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Discriminators":
        """Build from the dictionary that `config` holds."""
        return cls([build_module(spec) for spec in config["parts"]])

    def forward(self, wave: Tensor) -> list[ScaleOutput]:
        """Waves `[b, c, n]` to the outputs of all scales of all parts, in order."""
        return [output for part in self.parts for output in part(wave)]


def judge(layers: Iterable[nn.Module], last: nn.Module, x: Tensor) -> ScaleOutput:
    """Pass something through layers with leaky ReLUs between them, and keep what comes out of each.

    Args:
        layers: All layers but the last.
        last: Makes the logits.
        x: What goes in.

    Returns:
        The logits, and the features after each activation.
    """
    features = []
    for layer in layers:
        x = activated(layer(x))
        features.append(x)
    return ScaleOutput(last(x), features)


def activated(x: Tensor) -> Tensor:
    """Leaky ReLU of what a convolution gave; in place, since a convolution's gradient does not need its output."""
    return F.leaky_relu(x, _SLOPE, inplace=True)


def checked(wave: Tensor, channels: int) -> Tensor:
    """Refuse what is not `[b, channels, n]` with at least one sample."""
    if wave.ndim != 3 or wave.shape[1] != channels or wave.shape[2] == 0:
        raise ValueError(
            f"waves must be [b, {channels}, n] with n > 0, got {tuple(wave.shape)}; a discriminator is built for a "
            "number of channels (its `channels`)"
        )
    return wave
