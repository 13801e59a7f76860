"""A sound as the codes of a codec in one safetensors file, with everything that decoding must know."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.loudness import keeps_scales
from audiolm_pytorch.saving.files import read_weights, write_weights

__all__ = ["CODES_SUFFIX", "CodesInfo", "StoredCodes", "read_codes", "write_codes"]

CODES_SUFFIX = ".safetensors"
FORMAT_VERSION = 1
_TENSOR, _SCALES, _HEADER = "codes", "scales", "audio_codes"


@dataclass(frozen=True)
class CodesInfo:
    """What the codes of a sound are codes of.

    Attributes:
        codec_class: Class of the codec that made them.
        codec_fingerprint: Its fingerprint.
        codebook_size: Codes per level (v).
        sample_hz: The codec's rate (Hz).
        num_samples: Samples of the sound at that rate.
        channels: The codec's audio channels.
        original_sample_hz: Rate of the file that was encoded (Hz).
        original_num_samples: Its samples per channel.
        original_channels: Its channels.
    """

    codec_class: str
    codec_fingerprint: str
    codebook_size: int
    sample_hz: int
    num_samples: int
    channels: int
    original_sample_hz: int
    original_num_samples: int
    original_channels: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
            if field.type is str and not (isinstance(value, str) and value):
                raise ValueError(f"{field.name} must be a text, got {value!r}")


@dataclass(frozen=True)
class StoredCodes:
    """The codes of one sound.

    Attributes:
        codes: `[f, q]` int64, coarse level first.
        info: What they are codes of.
        scales: Loudness of each segment `[s]` float32, where the codec keeps that beside its codes.

    Raises:
        ValueError: If the codes are not int64 `[f, q]` in 0..codebook_size - 1, or the scales are no loudness.
    """

    codes: Tensor
    info: CodesInfo
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        codes, most = self.codes, self.info.codebook_size - 1
        if codes.ndim != 2 or codes.numel() == 0 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [f, q] with at least one frame, got {codes.dtype} {[*codes.shape]}")
        if codes.min() < 0 or codes.max() > most:
            raise ValueError(f"codes must lie in 0..{most}, got {int(codes.min())}..{int(codes.max())}")
        if self.scales is not None:
            is_loudness = self.scales.ndim == 1 and self.scales.dtype == torch.float32
            if not is_loudness or not (self.scales.isfinite() & (self.scales >= 0)).all():
                raise ValueError(
                    "scales must be float32 [s], finite and not negative, got "
                    f"{self.scales.dtype} {[*self.scales.shape]}"
                )

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return self.info.num_samples / self.info.sample_hz

    @property
    def kbps(self) -> float:
        """Bits of codes and scales a second, without entropy coding, in thousands."""
        bits = self.codes.numel() * math.log2(self.info.codebook_size)
        bits += 0 if self.scales is None else 32 * self.scales.numel()
        return bits / self.seconds / 1000

    def require_codec(self, codec: Codec, fingerprint: str | None = None) -> None:
        """Refuse a codec that did not make these codes: it would make noise of them.

        Args:
            codec: The one to decode with.
            fingerprint: Its fingerprint, if it is known already.

        Raises:
            ValueError: If it is another one, or the codes do not fit it; says what to do.
        """
        info, (num_frames, num_levels) = self.info, self.codes.shape
        given = codec.fingerprint() if fingerprint is None else fingerprint
        if given != info.codec_fingerprint:
            raise ValueError(
                f"the codes were made by another codec ({info.codec_class} {info.codec_fingerprint}, here is "
                f"{type(codec).__name__} {given}); give the one that made them"
            )
        shape = (info.sample_hz, info.channels, info.codebook_size)
        wanted = (codec.target_sample_hz, codec.channels, codec.codebook_size)
        if shape != wanted or num_levels > codec.num_quantizers or num_frames != codec.num_frames(info.num_samples):
            raise ValueError(
                f"the codes ({num_frames} frames of {num_levels} levels of {info.codebook_size}, "
                f"{info.num_samples} samples at {info.sample_hz} Hz, {info.channels} channels) do not fit their codec "
                f"({codec.num_frames(info.num_samples)} frames for that, up to {codec.num_quantizers} levels of "
                f"{codec.codebook_size} at {codec.target_sample_hz} Hz, {codec.channels} channels); encode again"
            )
        if (self.scales is not None) != keeps_scales(codec):
            raise ValueError(
                f"the codes come {'without' if self.scales is None else 'with'} scales, of which the codec "
                f"{'has one a segment' if self.scales is None else 'has none'}; encode again"
            )


@beartype
def write_codes(path: str | Path, stored: StoredCodes) -> None:
    """Write codes as a safetensors file, whole or not at all.

    The tensor `codes [f, q]` is int16, or int32 for more than 2^15 codes; `scales [s]` float32 lies beside it where the
    codec has them; the header has the entry `audio_codes`, a JSON object: `format_version` and the fields of
    `CodesInfo`.

    Args:
        path: Name ending in .safetensors; missing folders are made.
        stored: The codes.

    Raises:
        ValueError: If the name ends otherwise.
    """
    path = Path(path)
    if path.suffix != CODES_SUFFIX:
        raise ValueError(f"{path}: codes are stored in a safetensors file; use a name that ends in {CODES_SUFFIX}")
    dtype = torch.int16 if stored.info.codebook_size <= 2**15 else torch.int32
    header = json.dumps({"format_version": FORMAT_VERSION, **asdict(stored.info)})
    tensors = {_TENSOR: stored.codes.to(dtype)}
    if stored.scales is not None:
        tensors[_SCALES] = stored.scales
    write_weights(path, tensors, {_HEADER: header})


@beartype
def read_codes(path: str | Path) -> StoredCodes:
    """Read what `write_codes` wrote, and check all of it.

    Args:
        path: The file.

    Returns:
        The codes.

    Raises:
        ValueError: If the file is missing, damaged, something else, of another format version, or inconsistent.
    """
    tensors, metadata = read_weights(path)
    if _TENSOR not in tensors or tensors.keys() - {_TENSOR, _SCALES} or _HEADER not in metadata:
        raise ValueError(f"{path} holds something else than the codes of a sound; make them with write_codes")
    try:
        header = json.loads(metadata[_HEADER])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its header is damaged ({error})") from error
    header = header if isinstance(header, dict) else {}
    version = header.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this program reads {FORMAT_VERSION}; install the release that "
            "wrote it, or encode the sound again"
        )
    codes = tensors[_TENSOR]
    if codes.dtype not in (torch.int16, torch.int32):
        raise ValueError(f"{path}: codes are stored as int16 or int32, here as {codes.dtype}; encode the sound again")
    try:
        return StoredCodes(codes.long(), _info(header), tensors.get(_SCALES))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _info(header: dict[str, Any]) -> CodesInfo:
    names = {field.name for field in fields(CodesInfo)}
    if header.keys() != names:
        raise ValueError(
            f"its header lacks {sorted(names - header.keys())} or has unknown entries {sorted(header.keys() - names)}"
        )
    return CodesInfo(**header)
