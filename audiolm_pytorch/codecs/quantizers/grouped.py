"""Group-residual quantization: equal parts of a frame with a residual quantizer each (arXiv 2305.02765)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.quantizers.base import FrameQuantizer, Quantized, ResidualLevels
from audiolm_pytorch.codecs.quantizers.fixed_grid import ResidualFiniteScalarQuantizer, ResidualLookupFreeQuantizer
from audiolm_pytorch.codecs.quantizers.vector import ResidualQuantizer
from audiolm_pytorch.saving.modules import module_spec, register

__all__ = ["GroupedQuantizer", "make_quantizer"]


@register
class GroupedQuantizer(FrameQuantizer):
    """Several residual quantizers side by side, each for its own part of the frame.

    The codes run level by level, all groups of level 1 first, so that any prefix of the columns is a coarser version of
    the same frames; a prefix may end inside a level.

    Args:
        quantizers: One per part, in order, with equal numbers of levels and codes.
    """

    @beartype
    def __init__(self, *, quantizers: Sequence[ResidualLevels]) -> None:
        super().__init__()
        sizes = sorted({(part.num_quantizers, part.codebook_size) for part in quantizers})
        if len(sizes) != 1:
            raise ValueError(
                f"groups need equal numbers of levels and codes, got (levels, codes) {sizes or 'no group'}"
            )
        self.quantizers = nn.ModuleList(quantizers)
        self.widths = [part.dim for part in quantizers]
        self.dim = sum(self.widths)
        self.num_groups = len(quantizers)
        self.num_quantizers = len(quantizers) * sizes[0][0]
        self.codebook_size = sizes[0][1]

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {"quantizers": [module_spec(part) for part in self.quantizers]}

    def forward(self, frames: Tensor, num_levels: int | None = None) -> Quantized:
        """Quantize frames `[b, f, d]` (see `FrameQuantizer.forward`); all groups leave the same levels out."""
        if self.training and num_levels is None:
            num_levels = self._parts[0].draw_num_levels(frames.device)
        outputs = [part(part_frames, num_levels) for part, part_frames in zip(self._parts, self._split(frames))]
        quantized, codes, losses = zip(*outputs)
        return Quantized(torch.cat(quantized, dim=-1), _interleave(codes), torch.stack(losses).mean())

    def bypass(self, frames: Tensor) -> Tensor:
        """Frames `[b, f, d]` through the projections to the space of the codes and back, without codes."""
        return torch.cat([part.bypass(x) for part, x in zip(self._parts, self._split(frames))], dim=-1)

    def encode(self, frames: Tensor) -> Tensor:
        """Codes `[b, f, q]` int64 of frames `[b, f, d]`, level by level and in each level group by group."""
        return _interleave([part.encode(x) for part, x in zip(self._parts, self._split(frames))])

    def decode(self, codes: Tensor) -> Tensor:
        """Frames `[b, f, d]` of codes `[b, f, q']`; a group without any codes has its mean."""
        groups = self.num_groups
        return torch.cat([part.decode(codes[..., group::groups]) for group, part in enumerate(self._parts)], dim=-1)

    def initialise(self, frames: Tensor) -> None:
        """Fit every group to its part of frames `[n, d]`."""
        for part, part_frames in zip(self._parts, self._split(frames)):
            part.initialise(part_frames)

    def _split(self, frames: Tensor) -> tuple[Tensor, ...]:
        return frames.split(self.widths, dim=-1)

    @property
    def _parts(self) -> list[Any]:
        return list(self.quantizers)


def _interleave(codes: Sequence[Tensor]) -> Tensor:
    return rearrange(torch.stack(list(codes), dim=-1), "b f l g -> b f (l g)")


@beartype
def make_quantizer(
    *,
    dim: int,
    codebook_size: int,
    num_quantizers: int,
    groups: int = 1,
    lookup_free: bool = False,
    finite_scalar: bool = False,
) -> FrameQuantizer:
    """Create a quantizer with learnt codebooks, or a lookup-free (LFQ) or finite scalar (FSQ) one.

    Args:
        dim: Width of the frames.
        codebook_size: Codes per level and group.
        num_quantizers: Levels; a frame has `num_quantizers * groups` codes.
        groups: Number of equal parts of a frame, each with its own quantizer.
        lookup_free: Whether codes are signs.
        finite_scalar: Whether codes are rounded numbers.
    """
    if lookup_free and finite_scalar:
        raise ValueError("a quantizer is either lookup-free or finite-scalar: switch one of the two off")
    if groups < 1 or dim % groups:
        raise ValueError(f"frames of width {dim} have no {groups} equal groups; choose a divisor of {dim}")
    kind: Callable[..., ResidualLevels] = ResidualQuantizer
    if lookup_free:
        kind = ResidualLookupFreeQuantizer
    elif finite_scalar:
        kind = ResidualFiniteScalarQuantizer
    parts = [kind(dim=dim // groups, codebook_size=codebook_size, num_quantizers=num_quantizers) for _ in range(groups)]
    return parts[0] if groups == 1 else GroupedQuantizer(quantizers=parts)
