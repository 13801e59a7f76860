"""Feature-wise linear modulation (FiLM), with which a codec switches noise removal on and off."""

from typing import Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.modules import SavedModule, register

__all__ = ["FiLM"]


@register
class FiLM(SavedModule):
    """Scale and shift of each channel, selected by a denoising flag (SoundStream, arXiv 2107.03312, section III-F).

    SoundStream applies FiLM between encoder and quantizer, so that the codes describe the sound without noise. Before
    training, FiLM returns the frames unchanged for both values of the flag.
    """

    @typed
    def __init__(self, *, dim: int) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.config: dict[str, Any] = dict(dim=dim)
        self.dim = dim
        # gamma - 1 and beta for each flag; equal to a linear layer on a one-hot flag
        self.table = nn.Parameter(torch.zeros(2, 2 * dim))

    def forward(self, frames: Tensor, denoise: Tensor) -> Tensor:
        """Scale and shift frames `[b, f, d]` by flags `[b]` (True: remove noise); return frames `[b, f, d]`."""
        scale, shift = self.table[denoise.long()].unsqueeze(1).chunk(2, dim=-1)
        return frames * (1 + scale) + shift
