"""Quantizers, which convert frames of a codec to discrete codes and codes to frames."""

from audiolm_pytorch.codecs.quantizers.base import FrameQuantizer, Quantized, code_usage
from audiolm_pytorch.codecs.quantizers.fixed_grid import ResidualFiniteScalarQuantizer, ResidualLookupFreeQuantizer
from audiolm_pytorch.codecs.quantizers.grouped import GroupedQuantizer, make_quantizer
from audiolm_pytorch.codecs.quantizers.vector import ResidualQuantizer

__all__ = [
    "FrameQuantizer",
    "GroupedQuantizer",
    "Quantized",
    "ResidualFiniteScalarQuantizer",
    "ResidualLookupFreeQuantizer",
    "ResidualQuantizer",
    "code_usage",
    "make_quantizer",
]
