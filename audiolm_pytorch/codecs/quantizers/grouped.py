"""Group-residual quantization, with a separate residual quantizer for each equal part of a frame (arXiv 2305.02765)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.quantizers.base import FrameQuantizer, Quantized, ResidualLevels
from audiolm_pytorch.codecs.quantizers.fixed_grid import ResidualFiniteScalarQuantizer, ResidualLookupFreeQuantizer
from audiolm_pytorch.codecs.quantizers.vector import ResidualQuantizer
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.modules import module_spec, register

__all__ = ["GroupedQuantizer", "make_quantizer"]


@register
class GroupedQuantizer(FrameQuantizer):
    """Quantizer that divides a frame into equal parts, and quantizes each part with a separate residual quantizer.

    The columns of codes are ordered level by level, with all groups of level 1 first. The first q columns alone,
    for any q, decode to a coarser version of the frames.
    """

    @typed
    def __init__(self, *, quantizers: Sequence[ResidualLevels]) -> None:
        super().__init__()
        sizes = sorted({(part.num_quantizers, part.codebook_size) for part in quantizers})
        if len(sizes) != 1:
            raise ValueError(
                f"quantizers must have equal (num_quantizers, codebook_size), and not be empty, got {sizes or 'none'}"
            )
        self.quantizers: Any = nn.ModuleList(quantizers)
        self.widths = [part.dim for part in quantizers]
        self.dim = sum(self.widths)
        self.num_groups = len(quantizers)
        self.num_quantizers = len(quantizers) * sizes[0][0]
        self.codebook_size = sizes[0][1]

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as data that JSON can store."""
        return {"quantizers": [module_spec(part) for part in self.quantizers]}

    def forward(self, frames: Tensor, num_levels: int | None = None) -> Quantized:
        """Quantize frames `[b, f, d]` (see `FrameQuantizer.forward`); all groups skip the same levels."""
        if self.training and num_levels is None:
            num_levels = self.quantizers[0].draw_num_levels(frames.device)
        quantized, codes, losses = zip(*(part(x, num_levels) for part, x in self._parts(frames)))
        return Quantized(torch.cat(quantized, dim=-1), _interleave(codes), torch.stack(losses).mean())

    def bypass(self, frames: Tensor) -> Tensor:
        """Project frames `[b, f, d]` to the space of the code vectors and back, without quantization."""
        return torch.cat([part.bypass(x) for part, x in self._parts(frames)], dim=-1)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames `[b, f, d]` as codes `[b, f, q]` int64, ordered by level, and by group in each level."""
        return _interleave([part.encode(x) for part, x in self._parts(frames)])

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `[b, f, q']` to frames `[b, f, d]`; a group without codes is decoded to its mean vector."""
        groups = self.num_groups
        return torch.cat([part.decode(codes[..., group::groups]) for group, part in enumerate(self.quantizers)], dim=-1)

    def initialise(self, frames: Tensor) -> None:
        """Fit the codebooks of every group to its part of the frames `[n, d]`."""
        for part, part_frames in self._parts(frames):
            part.initialise(part_frames)

    def _parts(self, frames: Tensor) -> list[tuple[Any, Tensor]]:
        """Return each quantizer with its part of the frames."""
        return list(zip(self.quantizers, frames.split(self.widths, dim=-1)))


def _interleave(codes: Sequence[Tensor]) -> Tensor:
    return rearrange(torch.stack(list(codes), dim=-1), "b f l g -> b f (l g)")


@typed
def make_quantizer(
    *,
    dim: int,
    codebook_size: int,
    num_quantizers: int,
    groups: int = 1,
    lookup_free: bool = False,
    finite_scalar: bool = False,
) -> FrameQuantizer:
    """Create a quantizer with learnt codebooks, a lookup-free (LFQ) quantizer, or a finite scalar (FSQ) quantizer.

    A frame of width `dim` is divided into `groups` equal parts, which have separate quantizers of `num_quantizers`
    levels. LFQ codes are the signs of coordinates, and FSQ codes are rounded coordinates.
    """
    if lookup_free and finite_scalar:
        raise ValueError("got lookup_free=True and finite_scalar=True; set at most one of them")
    check_positive(dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers, groups=groups)
    if dim % groups:
        raise ValueError(f"frames of width {dim} cannot be divided into {groups} equal groups; use a divisor of {dim}")
    kind: Callable[..., ResidualLevels] = ResidualQuantizer
    if lookup_free:
        kind = ResidualLookupFreeQuantizer
    elif finite_scalar:
        kind = ResidualFiniteScalarQuantizer
    parts = [kind(dim=dim // groups, codebook_size=codebook_size, num_quantizers=num_quantizers) for _ in range(groups)]
    return parts[0] if groups == 1 else GroupedQuantizer(quantizers=parts)
