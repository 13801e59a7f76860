"""What some codecs keep beside their codes: the loudness that they divided segments by (EnCodec at 48 kHz)."""

from typing import Any

from beartype import beartype
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec

__all__ = ["codes_and_scales", "keeps_scales", "wave_of"]


def keeps_scales(codec: Codec) -> bool:
    """Whether the codes of a codec lack the loudness of segments."""
    return bool(getattr(codec, "normalises", False))


@beartype
def codes_and_scales(codec: Codec, wave: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode waves with everything that decoding can use.

    Args:
        codec: Any codec.
        wave: `[b, c, n]` at its rate.

    Returns:
        Codes `[b, f, q]`, and the scale of each segment `[b, s]` if the codec normalises segments.
    """
    if not keeps_scales(codec):
        return codec.tokenize(wave), None
    normalising: Any = codec
    codes, scales = normalising.encode(wave)
    return codes, scales


@beartype
def wave_of(codec: Codec, codes: Tensor, scales: Tensor | None, num_samples: int) -> Tensor:
    """Decode what `codes_and_scales` gave.

    Args:
        codec: The codec.
        codes: `[b, f, q']`, the first q' levels.
        scales: `[b, s]`, if there are any.
        num_samples: Samples wanted.

    Returns:
        Waves `[b, c, n]`.
    """
    if scales is None:
        return codec.decode_from_codebook_indices(codes, num_samples=num_samples)
    normalising: Any = codec
    return normalising.decode(codes, scales, num_samples=num_samples)
