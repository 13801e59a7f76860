"""Discriminators of codecs: networks that tell decoded audio from real audio, at several scales."""

from audiolm_pytorch.codecs.discriminators.published import encodec_discriminators, soundstream_discriminators
from audiolm_pytorch.codecs.discriminators.scales import Discriminators, ScaleOutput
from audiolm_pytorch.codecs.discriminators.spectral import ComplexSTFTDiscriminator, MultiScaleSTFTDiscriminator
from audiolm_pytorch.codecs.discriminators.wave import MultiScaleWaveDiscriminator

__all__ = [
    "ComplexSTFTDiscriminator",
    "Discriminators",
    "MultiScaleSTFTDiscriminator",
    "MultiScaleWaveDiscriminator",
    "ScaleOutput",
    "encodec_discriminators",
    "soundstream_discriminators",
]
