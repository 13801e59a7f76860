"""Residual finite scalar quantization: a code is a few coordinates, each rounded to some steps (arXiv 2309.15505)."""

from functools import cache
from typing import Any

from beartype import beartype
from torch import Tensor
from vector_quantize_pytorch import ResidualFSQ

from audiolm_pytorch.codecs.quantizers.scalar import ScalarLevels
from audiolm_pytorch.saving.modules import register

__all__ = ["ResidualFiniteScalarQuantizer", "steps_of"]

_FEWEST_STEPS, _MOST_STEPS = 3, 8


@register
class ResidualFiniteScalarQuantizer(ScalarLevels):
    """Residual FSQ: coordinates are rounded to a grid whose sides multiply to the codebook size; no codebook, no loss.

    Args:
        dim: Width of the frames.
        codebook_size: Codes per level, a product of numbers from 3 to 8 (`steps_of`).
        num_quantizers: Levels.
        level_dropout: Share of the training batches in which trailing levels are left out at random.

    Raises:
        ValueError: If `codebook_size` is no such product.
    """

    @beartype
    def __init__(
        self, *, dim: int, codebook_size: int = 1024, num_quantizers: int = 8, level_dropout: float = 0.5
    ) -> None:
        config: dict[str, Any] = dict(
            dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers, level_dropout=level_dropout
        )
        rvq = ResidualFSQ(dim=dim, levels=list(steps_of(codebook_size)), num_quantizers=num_quantizers)
        super().__init__(rvq, codebook_size, config)

    @property
    def bound(self) -> Tensor:
        """Largest coordinates, half a step outside the first level's grid, `[codebook_dim]`."""
        return self.rvq.soft_clamp_input_value

    def codebook(self, level: int) -> Tensor:
        """Code vectors of a level, `[v, codebook_dim]`."""
        return self.rvq.layers[level].implicit_codebook * self.rvq.scales[level]

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        _, index = self.rvq.layers[level](residual / self.rvq.scales[level])
        return index.long()


def steps_of(codebook_size: int) -> tuple[int, ...]:
    """Sides (3 to 8 steps each) of the grid with that many points: as many and then as even as possible.

    Many, because all levels refine the same coordinates: what these do not hold no level brings back.

    Raises:
        ValueError: If there is no such grid; names the nearest sizes that have one.
    """
    steps = _steps(codebook_size)
    if steps is None:
        lower = next((size for size in range(codebook_size - 1, 0, -1) if _steps(size)), None)
        higher = next(size for size in range(max(codebook_size, 1) + 1, 2**40) if _steps(size))
        nearest = " or ".join(str(size) for size in (lower, higher) if size)
        raise ValueError(
            f"a finite-scalar codebook of {codebook_size} codes would need it to be a product of numbers from "
            f"{_FEWEST_STEPS} to {_MOST_STEPS}; the nearest sizes that are: {nearest}; 256, 1000, 1024 and 4096 are too"
        )
    return steps


@cache
def _steps(size: int, most: int = _MOST_STEPS) -> tuple[int, ...] | None:
    """The sides in falling order, none above `most`; None if there are none."""
    if _FEWEST_STEPS <= size <= most:
        return (size,)
    found = [
        (first, *rest)
        for first in range(min(most, size), _FEWEST_STEPS - 1, -1)
        if size % first == 0 and (rest := _steps(size // first, first))
    ]
    return min(found, key=lambda sides: (-len(sides), sides[0] - sides[-1]), default=None)
