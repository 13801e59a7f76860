"""The sets of discriminators that the papers train with."""

from beartype import beartype

from audiolm_pytorch.codecs.discriminators.scales import Discriminators
from audiolm_pytorch.codecs.discriminators.spectral import ComplexSTFTDiscriminator, MultiScaleSTFTDiscriminator
from audiolm_pytorch.codecs.discriminators.wave import MultiScaleWaveDiscriminator

__all__ = ["encodec_discriminators", "soundstream_discriminators"]


@beartype
def soundstream_discriminators(channels: int = 1, width: int = 32) -> Discriminators:
    """Three resolutions of the wave and one complex STFT (SoundStream, arXiv 2107.03312, section III-D).

    Args:
        channels: Audio channels.
        width: First channels of the STFT discriminator (32 in the paper); the wave discriminator has half of it (16).
            A multiple of 8.

    Returns:
        Four scales.

    Raises:
        ValueError: If the width is not a multiple of 8.
    """
    if width < 8 or width % 8:
        raise ValueError(f"width is {width}; it must be a multiple of 8 (half of it is divided into groups of 4)")
    return Discriminators(
        [
            MultiScaleWaveDiscriminator(channels=channels, width=width // 2),
            ComplexSTFTDiscriminator(channels=channels, width=width),
        ]
    )


@beartype
def encodec_discriminators(channels: int = 1, width: int = 32) -> Discriminators:
    """Complex STFTs with five windows (EnCodec, arXiv 2210.13438, section 3.4).

    Args:
        channels: Audio channels.
        width: Filters of every layer (32 in the paper).

    Returns:
        Five scales.
    """
    return Discriminators([MultiScaleSTFTDiscriminator(channels=channels, width=width)])
