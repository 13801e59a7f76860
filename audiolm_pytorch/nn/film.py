"""Feature-wise scale and shift (FiLM) for the denoising condition of a codec."""

from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.saving.modules import register

__all__ = ["FiLM"]


@register
class FiLM(nn.Module):
    """Scales and shifts every channel of frames by a flag (SoundStream, arXiv 2107.03312, section III-F).

    SoundStream applies it between encoder and quantizer, so that the codes are those of the clean sound. Initially both
    flags leave the frames unchanged.
    """

    @beartype
    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(dim=dim)
        self.dim = dim
        # gamma - 1 and beta for each flag; equal to a linear layer on a one-hot flag
        self.table = nn.Parameter(torch.zeros(2, 2 * dim))

    def forward(self, frames: Tensor, denoise: Tensor) -> Tensor:
        """Frames `[b, f, d]` and flags `[b]` (True: remove noise) to frames `[b, f, d]`."""
        scale, shift = self.table[denoise.long()].unsqueeze(1).chunk(2, dim=-1)
        return frames * (1 + scale) + shift
