"""Several discriminators as one, and the sets of the SoundStream and EnCodec papers."""

from collections.abc import Sequence
from typing import Any

from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.codecs.discriminators.base import ScaleOutput
from audiolm_pytorch.codecs.discriminators.spectral import ComplexSTFTDiscriminator, MultiScaleSTFTDiscriminator
from audiolm_pytorch.codecs.discriminators.wave import MultiScaleWaveDiscriminator
from audiolm_pytorch.saving.modules import module_spec, register

__all__ = ["Discriminators", "encodec_discriminators", "soundstream_discriminators"]


@register
class Discriminators(nn.Module):
    """Several discriminators as one; each part returns a list of `ScaleOutput` for waves `[b, c, n]`."""

    @beartype
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts is empty; pass at least one discriminator")
        self.parts = nn.ModuleList(parts)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {"parts": [module_spec(part) for part in self.parts]}

    def forward(self, wave: Tensor) -> list[ScaleOutput]:
        """Outputs of all scales of all parts for waves `[b, c, n]`, in order."""
        return [output for part in self.parts for output in part(wave)]


@beartype
def soundstream_discriminators(channels: int = 1, width: int = 32) -> Discriminators:
    """Three resolutions of the wave and one complex STFT: four scales (SoundStream, arXiv 2107.03312, section III-D).

    `width` is the first number of channels of the STFT discriminator (32 in the paper), a multiple of 8; the wave
    discriminator has half of it.
    """
    if width < 8 or width % 8:
        raise ValueError(f"width must be a multiple of 8 (half of it is divided into groups of 4), got {width}")
    return Discriminators(
        [
            MultiScaleWaveDiscriminator(channels=channels, width=width // 2),
            ComplexSTFTDiscriminator(channels=channels, width=width),
        ]
    )


@beartype
def encodec_discriminators(channels: int = 1, width: int = 32) -> Discriminators:
    """Complex STFTs with five windows and `width` filters per layer (EnCodec, arXiv 2210.13438, section 3.4)."""
    return Discriminators([MultiScaleSTFTDiscriminator(channels=channels, width=width)])
