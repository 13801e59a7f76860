"""Discriminators for the training of codecs: networks that classify audio as real or decoded, at several scales."""

from audiolm_pytorch.codecs.discriminators.base import Discriminator, ScaleOutput
from audiolm_pytorch.codecs.discriminators.combined import (
    Discriminators,
    encodec_discriminators,
    soundstream_discriminators,
)
from audiolm_pytorch.codecs.discriminators.spectral import ComplexSTFTDiscriminator, MultiScaleSTFTDiscriminator
from audiolm_pytorch.codecs.discriminators.wave import MultiScaleWaveDiscriminator

__all__ = [
    "ComplexSTFTDiscriminator",
    "Discriminator",
    "Discriminators",
    "MultiScaleSTFTDiscriminator",
    "MultiScaleWaveDiscriminator",
    "ScaleOutput",
    "encodec_discriminators",
    "soundstream_discriminators",
]
