"""Combinations of discriminators, including those of the SoundStream and EnCodec papers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.discriminators.base import ScaleOutput
from audiolm_pytorch.codecs.discriminators.spectral import ComplexSTFTDiscriminator, MultiScaleSTFTDiscriminator
from audiolm_pytorch.codecs.discriminators.wave import MultiScaleWaveDiscriminator
from audiolm_pytorch.saving.modules import SavedModule, module_spec, register

__all__ = ["Discriminators", "encodec_discriminators", "soundstream_discriminators"]


@register
class Discriminators(SavedModule):
    """Combination of discriminators, each of which returns a list of `ScaleOutput` for waves `[b, c, n]`."""

    @typed
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts must be at least one discriminator, got an empty list")
        self.parts = nn.ModuleList(parts)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as data that JSON can store."""
        return {"parts": [module_spec(part) for part in self.parts]}

    def forward(self, wave: Tensor) -> list[ScaleOutput]:
        """Compute the outputs of all scales of all discriminators, in order, for waves `[b, c, n]`."""
        return [output for part in self.parts for output in part(wave)]


@typed
def soundstream_discriminators(channels: int = 1, width: int = 32) -> Discriminators:
    """Create discriminators of three wave resolutions and of one complex STFT (SoundStream, arXiv 2107.03312, III-D).

    `width` is the number of channels of the first STFT layer (32 in the paper), a multiple of 8. The first layer of the
    wave discriminator has `width / 2` channels.
    """
    if width < 8 or width % 8:
        raise ValueError(
            f"width must be a multiple of 8, so that width / 2 channels form groups of 4 channels, got {width}"
        )
    waves = MultiScaleWaveDiscriminator(channels=channels, width=width // 2)
    return Discriminators([waves, ComplexSTFTDiscriminator(channels=channels, width=width)])


@typed
def encodec_discriminators(channels: int = 1, width: int = 32) -> Discriminators:
    """Create a discriminator of five STFTs with `width` filters per layer (EnCodec, arXiv 2210.13438, section 3.4)."""
    return Discriminators([MultiScaleSTFTDiscriminator(channels=channels, width=width)])
