"""Quantizers: frames of a codec to discrete codes and back."""

from audiolm_pytorch.codecs.quantizers.finite_scalar import ResidualFiniteScalarQuantizer
from audiolm_pytorch.codecs.quantizers.grouped import GroupedQuantizer
from audiolm_pytorch.codecs.quantizers.levels import FrameQuantizer, Quantized
from audiolm_pytorch.codecs.quantizers.lookup_free import ResidualLookupFreeQuantizer
from audiolm_pytorch.codecs.quantizers.make import make_quantizer
from audiolm_pytorch.codecs.quantizers.usage import code_usage
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
