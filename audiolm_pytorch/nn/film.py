"""Conditioning of a codec on whether it shall remove noise."""

from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.saving.modules import register

__all__ = ["FiLM"]


@register
class FiLM(nn.Module):
    """Scales and shifts every channel of frames by what a flag says (SoundStream, arXiv 2107.03312, section III-F).

    Between encoder and quantizer, so that the codes themselves are of the clean sound. At the start both flags leave
    the frames as they are.

    Args:
        dim: Width of the frames.
    """

    @beartype
    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(dim=dim)
        self.dim = dim
        # a linear layer on a one-hot flag picks a row of a table: gamma - 1 and beta, each of width `dim`
        self.table = nn.Parameter(torch.zeros(2, 2 * dim))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FiLM":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor, denoise: Tensor) -> Tensor:
        """Frames `[b, f, d]` and flags `[b]` (True: remove noise) to frames `[b, f, d]`."""
        scale, shift = self.table[denoise.long()].unsqueeze(1).chunk(2, dim=-1)
        return frames * (1 + scale) + shift
