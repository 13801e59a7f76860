"""Contrast of layers inside the towers, beside the contrast of their outputs (ViCHA, arXiv:2208.13628)."""

import copy
from dataclasses import dataclass
from typing import Any

from beartype import beartype
from torch import nn

__all__ = ["LayerContrast", "LayerHeads"]


@beartype
@dataclass(frozen=True)
class LayerContrast:
    """Which layers of the two towers are held against each other.

    Attributes:
        layers: Pairs (blocks of the audio tower, blocks of the text tower); 0 = what enters the first block.
        weight: Factor of the sum of the losses of all pairs, beside 1 for the loss of the outputs.

    Raises:
        ValueError: If there is no pair, a layer is negative, or the weight is not positive.
    """

    layers: tuple[tuple[int, int], ...] = ((2, 2), (4, 4))
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        if not self.layers or min(map(min, self.layers)) < 0 or not self.weight > 0:
            raise ValueError(f"need pairs of layers >= 0 and a positive weight, got {self.layers} and {self.weight}")

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {"layers": [list(pair) for pair in self.layers], "weight": self.weight}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LayerContrast":
        """Build from `config`."""
        return cls(**{**config, "layers": tuple((audio, text) for audio, text in config["layers"])})


class LayerHeads(nn.Module):
    """For every pair of layers, projections of both to a space of their own, and the loss there.

    Args:
        layers: Pairs (blocks of the audio tower, blocks of the text tower).
        dims: Width of the audio tower and of the text tower.
        dim_latent: Width of the common spaces.
        loss: The loss of the outputs; each pair has one like it, with a temperature of its own.
    """

    def __init__(
        self, layers: tuple[tuple[int, int], ...], dims: tuple[int, int], dim_latent: int, loss: nn.Module
    ) -> None:
        super().__init__()
        self.audio_layers, self.text_layers = ([pair[tower] for pair in layers] for tower in (0, 1))
        self.audio_to_latent, self.text_to_latent = (
            nn.ModuleList(nn.Linear(dim, dim_latent) for _ in layers) for dim in dims
        )
        self.losses = nn.ModuleList(copy.deepcopy(loss) for _ in layers)
