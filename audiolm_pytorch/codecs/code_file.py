"""Read and write safetensors files that contain the codes of a sound and the information for decoding."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from audiolm_pytorch.audio.resample import resampled_length
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.saving.files import check_seal, check_version, read_weights, write_weights

__all__ = ["CODES_MARKS", "CodesCompressor", "CodesInfo", "StoredCodes", "read_codes", "write_codes"]

_SUFFIX = ".safetensors"
_FORMAT_VERSION = 1
_MAX_INTEGER = 2**53  # exact also as a float
_CODES, _SCALES, _COMPRESSION = "codes", "scales", "compression"
_HEADER = "audio_codes"
CODES_MARKS = (_HEADER,)


@dataclass(frozen=True)
class CodesInfo:
    """Description of the codec and of the encoded sound; the fields `original_...` describe the sound file."""

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
            if field.type is int and (type(value) is not int or not 1 <= value <= _MAX_INTEGER):
                raise ValueError(
                    f"{field.name} must be an integer of at least 1 and at most {_MAX_INTEGER}, got {value!r:.40}"
                )
            if field.type is str and not (isinstance(value, str) and value):
                raise ValueError(f"{field.name} must be a non-empty string, got {value!r}")


@dataclass(frozen=True)
class StoredCodes:
    """The codes `[f, q]` int64 of one sound, coarse level first, with the information to decode the codes.

    `scales [s]` float32 contains the loudness of each segment; None if the codec has no scales.
    """

    codes: Tensor
    info: CodesInfo
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        codes, largest = self.codes, self.info.codebook_size - 1
        if codes.ndim != 2 or codes.numel() == 0 or codes.dtype != torch.int64:
            raise ValueError(
                f"codes must be int64 [f, q] with at least one frame, got {codes.dtype} with shape {[*codes.shape]}"
            )
        if codes.min() < 0 or codes.max() > largest:
            raise ValueError(f"codes must lie in 0..{largest}, got {int(codes.min())}..{int(codes.max())}")
        scales = self.scales
        if scales is not None and not (
            scales.ndim == 1 and scales.dtype == torch.float32 and (scales.isfinite() & (scales >= 0)).all()
        ):
            raise ValueError(
                f"scales must be float32 [s], finite and not negative, got {scales.dtype} with shape {[*scales.shape]}"
            )

    @property
    def seconds(self) -> float:
        """Duration of the sound."""
        return self.info.num_samples / self.info.sample_hz

    @property
    def kbps(self) -> float:
        """Bitrate of codes and scales together, without entropy coding."""
        bits = self.codes.numel() * math.log2(self.info.codebook_size)
        bits += 0 if self.scales is None else 32 * self.scales.numel()
        return bits / self.seconds / 1000

    def check_codec(self, codec: Codec, fingerprint: str) -> None:
        """Check that `codec` encoded the sound, because another codec would decode the codes to noise."""
        info, (num_frames, num_levels) = self.info, self.codes.shape
        if fingerprint != info.codec_fingerprint:
            raise ValueError(
                f"the codes are from the codec {info.codec_class} {info.codec_fingerprint}, got the codec "
                f"{type(codec).__name__} {fingerprint}; decode with the codec that encoded the sound"
            )
        sizes = (info.sample_hz, info.channels, info.codebook_size, info.num_samples, num_frames)
        num_samples = resampled_length(info.original_num_samples, info.original_sample_hz, codec.target_sample_hz)
        num_expected = codec.num_frames(info.num_samples)
        codec_sizes = (codec.target_sample_hz, codec.channels, codec.codebook_size, num_samples, num_expected)
        if sizes != codec_sizes or num_levels > codec.num_quantizers:
            raise ValueError(
                f"sample rate, channels, codebook size, samples, frames and levels are {(*sizes, num_levels)} in the "
                f"file, but {(*codec_sizes, codec.num_quantizers)} in the codec; encode the sound again"
            )
        if (self.scales is not None) != codec.has_scales:
            raise ValueError(
                f"the file contains {'no scales' if self.scales is None else 'scales'}, but the codec needs "
                f"{'one scale per segment' if codec.has_scales else 'no scales'}; encode the sound again"
            )


@runtime_checkable
class CodesCompressor(Protocol):
    """Lossless compression of codes, such as `EntropyCoder`."""

    @property
    def fingerprint(self) -> str:
        """Identity of the probabilities, which must be equal when codes are read."""

    def encode(self, codes: Tensor) -> dict[str, Tensor]:
        """Compress codes `[f, q]` to named tensors."""

    def decode(self, tensors: Mapping[str, Tensor], num_frames: int, num_levels: int) -> Tensor:
        """Return the codes `[num_frames, num_levels]`; raise a ValueError if the tensors are damaged."""


@typed
def write_codes(path: str | Path, stored: StoredCodes, compressor: CodesCompressor | None = None) -> int:
    """Write codes to a safetensors file; no partly written file appears at its path. Missing folders are created.

    The tensor `codes [f, q]` is int16, or int32 for codebooks of more than 2^15 codes; `scales [s]` is float32. The
    header entry `audio_codes` is a JSON object with `format_version` and the fields of `CodesInfo`. The header also has
    a digest of the whole content. With a `compressor`, its tensors replace `codes`, and the header entry `compression`
    is a JSON object with its fingerprint and the shape of the codes.

    Returns:
        Number of bytes of all tensors.
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"cannot write codes to {path}; use a file name that ends in {_SUFFIX}")
    dtype = torch.int16 if stored.info.codebook_size <= 2**15 else torch.int32
    header = json.dumps({"format_version": _FORMAT_VERSION, **asdict(stored.info)})
    tensors, metadata = {_CODES: stored.codes.to(dtype)}, {_HEADER: header}
    if compressor is not None:
        tensors = compressor.encode(stored.codes)
        num_frames, num_levels = stored.codes.shape
        shape = {"num_frames": num_frames, "num_levels": num_levels}
        metadata[_COMPRESSION] = json.dumps({"fingerprint": compressor.fingerprint, **shape})
    if stored.scales is not None:
        tensors[_SCALES] = stored.scales
    write_weights(path, tensors, metadata, sealed=True)
    return sum(tensor.nbytes for tensor in tensors.values())


@typed
def read_codes(path: str | Path, compressor: CodesCompressor | None = None) -> StoredCodes:
    """Read and check a file that `write_codes` wrote; raise a ValueError if it is damaged or of another format.

    Compressed codes need the `compressor` that wrote them, with the same model; other codes need none.
    """
    tensors, metadata = read_weights(path)
    is_compressed = _COMPRESSION in metadata
    if _HEADER not in metadata or not (is_compressed or tensors.keys() - {_SCALES} == {_CODES}):
        raise ValueError(f"{path} is not a file of codes; create a file of codes with write_codes")
    if len(metadata) > 1:  # earlier releases wrote no digest
        check_seal(path, tensors, metadata)
    header = check_version(_json_header(path, metadata[_HEADER]), _FORMAT_VERSION, path)
    del header["format_version"]
    names = {field.name for field in fields(CodesInfo)}
    if header.keys() != names:
        raise ValueError(
            f"{path}: the header lacks the entries {sorted(names - header.keys())} and has the unknown entries "
            f"{sorted(header.keys() - names)}; encode the sound again"
        )
    scales = tensors.pop(_SCALES, None)
    try:
        if is_compressed:
            codes = _decompressed(tensors, _json_header(path, metadata[_COMPRESSION]), compressor)
        elif compressor is not None:
            raise ValueError("the codes are not compressed; leave out the entropy model (--entropy)")
        else:
            codes = tensors[_CODES]
            if codes.dtype not in (torch.int16, torch.int32):
                raise ValueError(f"codes must be int16 or int32, got {codes.dtype}; encode the sound again")
        return StoredCodes(codes.long(), CodesInfo(**header), scales)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _json_header(path: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: the header is damaged ({error})") from error


def _decompressed(tensors: Mapping[str, Tensor], facts: Any, compressor: CodesCompressor | None) -> Tensor:
    """Decode compressed codes; `facts` is the header entry `compression`."""
    shape = [facts.get(name) for name in ("num_frames", "num_levels")] if isinstance(facts, dict) else []
    if not shape or any(type(size) is not int or not 1 <= size <= _MAX_INTEGER for size in shape):
        raise ValueError("the header has no number of frames and levels; encode the sound again")
    fingerprint = None if compressor is None else compressor.fingerprint
    if compressor is None or facts.get("fingerprint") != fingerprint:
        raise ValueError(
            f"the codes are compressed by the entropy model {facts.get('fingerprint')!r:.60}, got the model "
            f"{fingerprint}; pass the model that encoded the sound (--entropy)"
        )
    return compressor.decode(tensors, facts["num_frames"], facts["num_levels"])
