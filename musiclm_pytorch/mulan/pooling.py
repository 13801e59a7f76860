"""How a tower makes one embedding of many tokens: the mean over the real ones, after any of its blocks."""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor

from audiolm_pytorch.nn.encoder import TransformerEncoder

__all__ = ["pooled_layers", "token_means"]


def token_means(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Average over the real tokens: `l` states `[b, t, d]` and mask `[b, t]` bool -> `[l, b, d]` float32."""
    count = mask.sum(dim=1, keepdim=True)
    real = rearrange(mask, "b t -> b t 1")
    return torch.stack([reduce(state.float() * real, "b t d -> b d", "sum") / count for state in states])


def pooled_layers(
    encoder: TransformerEncoder,
    tokens: Tensor,
    mask: Tensor,
    layers: Sequence[int],
    positions: Tensor | None = None,
) -> Tensor:
    """Encode tokens, and average what stands after some of the blocks.

    Args:
        encoder: The blocks.
        tokens: `[b, t, d]`.
        mask: `[b, t]` bool, True where a token is real.
        layers: Numbers of blocks, 0..depth; `depth` stands for the normalised output.
        positions: As for the encoder.

    Returns:
        Tensor `[l, b, d]` float32.

    Raises:
        ValueError: If a layer is not there.
    """
    states = encoder.hidden_states(
        tokens,
        None if bool(mask.all()) else mask,
        positions=positions,
        layers=[None if layer == encoder.depth else layer for layer in layers],
    )
    return token_means(states, mask)
