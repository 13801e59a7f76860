"""One function that makes any kind of quantizer."""

from typing import Any

from beartype import beartype
from torch import nn

from audiolm_pytorch.codecs.quantizers.finite_scalar import ResidualFiniteScalarQuantizer
from audiolm_pytorch.codecs.quantizers.grouped import GroupedQuantizer
from audiolm_pytorch.codecs.quantizers.levels import ResidualLevels
from audiolm_pytorch.codecs.quantizers.lookup_free import ResidualLookupFreeQuantizer
from audiolm_pytorch.codecs.quantizers.vector import ResidualQuantizer

__all__ = ["make_quantizer"]


@beartype
def make_quantizer(
    *,
    dim: int,
    codebook_size: int,
    num_quantizers: int,
    groups: int = 1,
    lookup_free: bool = False,
    finite_scalar: bool = False,
) -> nn.Module:
    """Make a frame quantizer (see `FrameQuantizer`) of the kind asked for.

    Args:
        dim: Width of the frames.
        codebook_size: Codes per level and group.
        num_quantizers: Levels; with groups, a frame has `num_quantizers * groups` codes.
        groups: Parts into which a frame is cut, each with a quantizer of its own.
        lookup_free: Whether codes are signs (LFQ) instead of learnt vectors.
        finite_scalar: Whether codes are rounded numbers (FSQ) instead of learnt vectors.

    Raises:
        ValueError: If both kinds are asked for, or the sizes do not go with the kind or the groups.
    """
    if lookup_free and finite_scalar:
        raise ValueError("a quantizer is either lookup-free or finite-scalar: switch one of the two off")
    if groups < 1 or dim % groups:
        raise ValueError(f"frames of width {dim} cannot be cut into {groups} equal groups; choose a divisor of {dim}")
    sizes: dict[str, Any] = dict(dim=dim // groups, codebook_size=codebook_size, num_quantizers=num_quantizers)
    kind: type[ResidualLevels] = ResidualQuantizer
    if lookup_free:
        kind = ResidualLookupFreeQuantizer
    elif finite_scalar:
        kind = ResidualFiniteScalarQuantizer
    parts = [kind.from_config(sizes) for _ in range(groups)]
    return parts[0] if groups == 1 else GroupedQuantizer(quantizers=parts)
