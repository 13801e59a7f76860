"""Embeddings from inner layers of the audio and text towers, and contrastive losses between inner layers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.transformer import Transformer

__all__ = ["LayerContrast", "LayerHeads", "pooled_layers", "token_means"]


def token_means(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Average `l` hidden states `[b, t, d]` over the tokens that `mask [b, t]` marks; return `[l, b, d]` float32."""
    count = mask.sum(dim=1, keepdim=True)
    real = rearrange(mask, "b t -> b t 1")
    return torch.stack([reduce(state.float() * real, "b t d -> b d", "sum") / count for state in states])


def pooled_layers(
    encoder: Transformer, tokens: Tensor, mask: Tensor, layers: Sequence[int], positions: Tensor | None = None
) -> Tensor:
    """Encode tokens `[b, t, d]` and return the means `[l, b, d]` float32 of the hidden states of several layers.

    Each of `layers` is a number of transformer blocks in 0..depth; layer `depth` is the normalised output. The mask
    `[b, t]` is True for real tokens and False for padding.
    """
    states = encoder.hidden_states(
        tokens,
        mask if is_traced() or not bool(mask.all()) else None,
        positions=positions,
        layers=[None if layer == encoder.depth else layer for layer in layers],
    )
    return token_means(states, mask)


@typed
@dataclass(frozen=True)
class LayerContrast:
    """Settings of contrastive losses between inner layers of both towers (ViCHA, arXiv:2208.13628).

    Attributes:
        layers: Pairs (audio layer, text layer), each layer as a number of blocks; 0 = the input of the first block.
        weight: Factor of the summed losses of all pairs of layers; the loss of the outputs has factor 1.
    """

    layers: tuple[tuple[int, int], ...] = ((2, 2), (4, 4))
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.layers or min(map(min, self.layers)) < 0 or not 0 < self.weight < float("inf"):
            raise ValueError(
                f"need layers >= 0 and a finite weight > 0, got layers {self.layers}, weight {self.weight}"
            )

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        return {"layers": [list(pair) for pair in self.layers], "weight": self.weight}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LayerContrast":
        """Build the settings of the losses from `config`."""
        return cls(**{**config, "layers": tuple((audio, text) for audio, text in config["layers"])})


class LayerHeads(nn.Module):
    """Projections of each pair of layers to a common space, and a contrastive loss for each pair of layers.

    The first number of `dims` and of each pair in `layers` belongs to the audio tower, the second to the text tower.
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
