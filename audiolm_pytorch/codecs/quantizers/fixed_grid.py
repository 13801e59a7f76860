"""Residual quantizers with fixed grids: lookup-free (arXiv 2310.05737) and finite scalar (arXiv 2309.15505)."""

import math
from abc import abstractmethod
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.quantizers.base import ResidualLevels
from audiolm_pytorch.codecs.quantizers.distributed import distributed_mean
from audiolm_pytorch.nn.module_state import check_positive, check_shares
from audiolm_pytorch.saving.modules import constructor_arguments, register

__all__ = ["ResidualFiniteScalarQuantizer", "ResidualLookupFreeQuantizer", "grid_steps"]

_MIN_STEPS, _MAX_STEPS = 3, 8


class _GridLevels(ResidualLevels):
    """Residual quantizer whose levels round every coordinate; each level has a finer grid than the previous one.

    `bound * tanh(x / bound)` limits coordinates to the range of the first level. The grid of each later level covers
    all possible residuals of the previous level. All levels use straight-through gradients.
    """

    @property
    @abstractmethod
    def bound(self) -> Tensor | float:
        """Largest coordinate that all levels together can represent, a number or `[codebook_dim]`."""

    def level_loss(self, residual: Tensor, level: int) -> Tensor | float:
        """Compute the training loss of a level from its residual `[b, f, codebook_dim]`."""
        return 0.0

    def initialise(self, frames: Tensor) -> None:
        """Do nothing, because a fixed grid needs no initialisation, and gradients train the projections."""

    def _project(self, frames: Tensor) -> Tensor:
        projected = super()._project(frames)
        with torch.autocast(frames.device.type, enabled=False):
            return self.bound * (projected / self.bound).tanh()

    def _quantize_in_training(self, projected: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
        total, loss, codes = torch.zeros_like(projected), projected.new_zeros(()), []
        for level in range(num_levels):
            residual = projected - total
            codes.append(self._nearest(residual.detach(), level))
            loss = loss + self.level_loss(residual, level) / num_levels
            total = total + F.embedding(codes[-1], self.codebook(level))
        return projected + (total - projected).detach(), torch.stack(codes, dim=-1), loss


@register
class ResidualLookupFreeQuantizer(_GridLevels):
    """Lookup-free residual quantizer; level k adds or subtracts `2**-k` in each of `log2(codebook_size)` coordinates.

    The signs of the coordinates select the code, without a search in a codebook. Without a loss, a coordinate can have
    the same sign in all frames, which leaves codes unused. The entropy loss of arXiv 2310.05737 (section 3.1) is low if
    each frame selects one code with certainty and all codes are used equally. The entropy loss of
    vector-quantize-pytorch 1.32 is not used, because it ignores the batches of other processes.

    Args:
        codebook_size: Number of codes per level, a power of 2.
        entropy_weight: Weight of the entropy loss, which is the unused share (0 to 1) of the capacity of a codebook.
        temperature: Distance from zero, in grid steps of the level, at which the sign of a coordinate counts as
            certain.
        level_dropout: Share of the training batches in which a random number of the last levels is skipped.
    """

    bound = 2.0

    @typed
    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int = 1024,
        num_quantizers: int = 8,
        entropy_weight: float = 0.1,
        temperature: float = 1.0,
        level_dropout: float = 0.5,
    ) -> None:
        config = constructor_arguments(locals())
        check_positive(dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers)
        check_shares(entropy_weight=entropy_weight, level_dropout=level_dropout)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be finite and above 0, got {temperature}")
        from vector_quantize_pytorch import ResidualLFQ

        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            lower = 2 ** max(1, codebook_size.bit_length() - 1)
            raise ValueError(
                f"a lookup-free codebook needs a power of 2 as its size, got {codebook_size}; use {lower} or "
                f"{2 * lower}"
            )
        super().__init__(ResidualLFQ(dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers), config)
        self.train()

    def train(self, mode: bool = True) -> "ResidualLookupFreeQuantizer":
        """Set training or eval mode; the layers stay in eval mode, in which they only compute signs."""
        super().train(mode)
        self.rvq.eval()
        return self

    def codebook(self, level: int) -> Tensor:
        """Return the code vectors `[v, codebook_dim]` of a level."""
        return self.rvq.layers[level].codebook

    def level_loss(self, residual: Tensor, level: int) -> Tensor | float:
        """Compute the weighted entropy loss; it is 0 if all codes are used equally and each choice is certain."""
        if self.config["entropy_weight"] == 0:
            return 0.0
        logits = rearrange(residual, "b f d -> (b f) d") * (2 ** (level + 1) / self.config["temperature"])
        positive = logits.sigmoid()
        # Signs are independent, so the entropy of a frame is the sum over coordinates.
        frame_entropy = positive * F.softplus(-logits) + (1 - positive) * F.softplus(logits)
        # The probability of a code is a product over coordinates, so the mean over frames is one matrix product.
        half = logits.shape[-1] // 2
        total = _code_probabilities(positive[:, :half]).t() @ _code_probabilities(positive[:, half:])
        probability = distributed_mean(total, len(logits))
        code_entropy = -(probability * probability.clamp(min=1e-12).log()).sum()
        unused_share = 1 + (frame_entropy.sum(dim=-1).mean() - code_entropy) / math.log(self.codebook_size)
        return self.config["entropy_weight"] * unused_share

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        return self.rvq.layers[level](residual).indices.long()


def _code_probabilities(positive: Tensor) -> Tensor:
    """Compute the probabilities `[n, 2**d]` of all sign patterns from the probabilities `[n, d]` of positive signs."""
    patterns = positive.new_ones(len(positive), 1)
    for plus in positive.split(1, dim=-1):
        patterns = torch.cat([patterns * (1 - plus), patterns * plus], dim=-1)
    return patterns


@register
class ResidualFiniteScalarQuantizer(_GridLevels):
    """Residual finite scalar quantizer, which rounds coordinates to grid points and needs no loss.

    `codebook_size`, the number of grid points per level, must be a product of numbers from 3 to 8 (see `grid_steps`).
    """

    @typed
    def __init__(
        self, *, dim: int, codebook_size: int = 1024, num_quantizers: int = 8, level_dropout: float = 0.5
    ) -> None:
        config = constructor_arguments(locals())
        check_positive(dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers)
        check_shares(level_dropout=level_dropout)
        from vector_quantize_pytorch import ResidualFSQ

        levels = list(grid_steps(codebook_size))
        super().__init__(ResidualFSQ(dim=dim, levels=levels, num_quantizers=num_quantizers), config)

    @property
    def bound(self) -> Tensor:
        """Largest coordinates `[codebook_dim]`, half a grid step above the largest point of the first level."""
        return self.rvq.soft_clamp_input_value

    def codebook(self, level: int) -> Tensor:
        """Return the code vectors `[v, codebook_dim]` of a level."""
        return self.rvq.layers[level].implicit_codebook * self.rvq.scales[level]

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        _, index = self.rvq.layers[level](residual / self.rvq.scales[level])
        return index.long()


def grid_steps(codebook_size: int) -> tuple[int, ...]:
    """Split `codebook_size` into similar factors from 3 to 8, which are the numbers of grid points per dimension.

    The result has as many factors as possible, so that the grid has as many dimensions as possible.
    """
    steps = _factors(codebook_size)
    if steps is None:
        lower = next((size for size in range(codebook_size - 1, 0, -1) if _factors(size)), None)
        higher = next(size for size in range(max(codebook_size, 1) + 1, 2**40) if _factors(size))
        nearest = " or ".join(str(size) for size in (lower, higher) if size)
        raise ValueError(
            f"a finite-scalar codebook of {codebook_size} codes is not possible; use a product of numbers from "
            f"{_MIN_STEPS} to {_MAX_STEPS}, for example {nearest}"
        )
    return steps


@cache
def _factors(size: int, largest: int = _MAX_STEPS) -> tuple[int, ...] | None:
    """Split `size` into factors from 3 to `largest` in decreasing order; return None if no such factors exist."""
    if _MIN_STEPS <= size <= largest:
        return (size,)
    candidates = [
        (first, *rest)
        for first in range(min(largest, size), _MIN_STEPS - 1, -1)
        if size % first == 0 and (rest := _factors(size // first, first))
    ]
    return min(candidates, key=lambda sides: (-len(sides), sides[0] - sides[-1]), default=None)
