"""Residual quantizers whose codes are a fixed grid: every coordinate is rounded by itself, each level more finely."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.codecs.quantizers.levels import ResidualLevels

__all__ = ["ScalarLevels"]


class ScalarLevels(ResidualLevels):
    """Levels of one grid, each scaled down to what the level before leaves over.

    Coordinates are bounded softly, by `bound * tanh(x / bound)`, to what the first level covers; every further level
    then covers what is left exactly. Gradients pass straight through all levels at once.
    """

    @property
    @abstractmethod
    def bound(self) -> Tensor | float:
        """Largest coordinate that the levels can approach, a number or `[codebook_dim]`."""

    def level_loss(self, residual: Tensor, level: int) -> Tensor | float:
        """What a level adds to the loss, given what it quantizes, `[b, f, codebook_dim]`; nothing by default."""
        return 0.0

    def initialise(self, frames: Tensor) -> None:
        """Nothing to fit: the grid is fixed, and the projections are trained."""

    def _projected(self, frames: Tensor) -> Tensor:
        inner = super()._projected(frames)
        with torch.autocast(frames.device.type, enabled=False):
            return self.bound * (inner / self.bound).tanh()

    def _quantize_in_training(self, inner: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
        total, loss, codes = torch.zeros_like(inner), inner.new_zeros(()), []
        for level in range(levels):
            residual = inner - total
            codes.append(self._nearest(residual.detach(), level))
            loss = loss + self.level_loss(residual, level) / levels
            total = total + F.embedding(codes[-1], self.codebook(level))
        return inner + (total - inner).detach(), torch.stack(codes, dim=-1), loss
