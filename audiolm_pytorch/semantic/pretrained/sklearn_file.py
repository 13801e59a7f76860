"""Centroids of others: scikit-learn's k-means as joblib wrote it, read without either, and safetensors."""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.saving.files import read_weights, write_weights
from audiolm_pytorch.saving.pickled_values import PLAIN_CLASSES, NumericArray, bytes_needed
from audiolm_pytorch.saving.restricted_pickle import (
    RefusedPickleError,
    RestrictedUnpickler,
    StandIn,
    checked_file,
    one_line_errors,
)

__all__ = ["CentroidFile", "read_centroids", "read_kmeans_file", "write_centroids"]

_ROOTS = ("sklearn", "numpy.random")
_DOWNLOAD = "download or copy it again"
_PUBLISHED = "give a k-means as published, e.g. hubert_base_ls960_L9_km500.bin, or centroids in a .safetensors file"
_TORCH_ARCHIVE = b"PK\x03\x04"  # what torch.save writes is a zip archive
_DUMP_AGAIN = "write it again where scikit-learn is: joblib.dump(kmeans, path)"
# A file is unpacked before it is read; the published one is 3 MB, and a bomb of a few kB must not fill the memory.
_MOST_BYTES = 2**28
_CHUNK_BYTES = 2**20
# joblib's own settings of lzma need 64 MiB to be unpacked; a file may ask for gigabytes.
_MOST_LZMA_BYTES = 2**28
_ZLIB_OR_GZIP = 32 + 15
_ZLIB, _GZIP, _BZ2, _LZMA, _XZ = b"\x78", b"\x1f\x8b", b"BZ", b"\x5d\x00", b"\xfd7zXZ"
_LZ4, _OLD_ZLIB = b"\x04\x22\x4d\x18", b"ZF"


@dataclass(frozen=True, eq=False)
class CentroidFile:
    """Centroids, and what features were normalised by before they were compared with them.

    Attributes:
        centroids: `[k, d]` float32.
        mean: `[d]` float32; None = nothing was taken off.
        std: `[d]` float32; None = nothing was divided.
    """

    centroids: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None


@beartype
def read_kmeans_file(path: str | Path) -> Tensor:
    """Read the centroids of a k-means of scikit-learn that joblib wrote; neither is imported, nothing in it is run.

    Args:
        path: The file, plain or compressed (zlib, gzip, bz2, lzma, xz), whatever its name.

    Returns:
        Centroids `[k, d]` float32.

    Raises:
        ValueError: If it is missing, damaged, of another kind, or names anything but data; one line with the mend.
    """
    path = checked_file(path, _PUBLISHED)
    with one_line_errors(path), path.open("rb") as file:
        if file.read(len(_TORCH_ARCHIVE)) == _TORCH_ARCHIVE:
            raise RefusedPickleError(f"is a checkpoint of torch: are checkpoint and k-means exchanged? {_PUBLISHED}")
        file.seek(0)
        stream = BytesIO(_unpacked(file))
        found = RestrictedUnpickler(stream, _classes(stream), _ROOTS, source=path).load()
    centroids = found.fields.get("cluster_centers_") if isinstance(found, StandIn) else None
    if not isinstance(centroids, NumericArray) or centroids.array is None:
        what = found.name[:80] if isinstance(found, StandIn) else type(found).__name__
        raise ValueError(f"{path} holds a {what} without cluster_centers_, not a fitted k-means; {_PUBLISHED}")
    array = centroids.array
    if array.dtype.kind != "f":
        raise ValueError(f"{path} has centroids of type {array.dtype}, floats are needed; {_PUBLISHED}")
    return _checked_centroids(torch.from_numpy(array.astype("float32", order="C")), path)


@beartype
def read_centroids(path: str | Path) -> CentroidFile:
    """Read centroids from a .safetensors file, or from a k-means of scikit-learn.

    Args:
        path: A file with `centroids [k, d]` and perhaps `mean [d]` and `std [d]`, as `write_centroids` makes it; or
            what `read_kmeans_file` reads.

    Returns:
        The centroids, float32.

    Raises:
        ValueError: If the file is missing, damaged, or not such a one.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return CentroidFile(read_kmeans_file(path))
    weights, _ = read_weights(checked_file(path, _PUBLISHED))
    known = {"centroids", "mean", "std"}
    if "centroids" not in weights or set(weights) - known:
        raise ValueError(f"{path} has tensors {sorted(weights)[:8]}; centroids [k, d], mean [d] and std [d] are read")
    tensors = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
    return _checked_file_content(CentroidFile(**tensors), path)


@beartype
def write_centroids(
    path: str | Path, centroids: Tensor, *, mean: Tensor | None = None, std: Tensor | None = None
) -> None:
    """Write centroids as safetensors, for `read_centroids`.

    Args:
        path: The file; its name ends in .safetensors.
        centroids: `[k, d]`.
        mean: `[d]`, taken off features first.
        std: `[d]`, features are divided by it then.

    Raises:
        ValueError: If shapes do not fit, or the name ends otherwise.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, or it would be read as a k-means of scikit-learn")
    _checked_file_content(CentroidFile(centroids, mean, std), path)
    parts = {"centroids": centroids, "mean": mean, "std": std}
    weights = {name: part.detach().cpu().to(torch.float32).clone() for name, part in parts.items() if part is not None}
    write_weights(path, weights)


def _checked_file_content(content: CentroidFile, path: Path) -> CentroidFile:
    width = _checked_centroids(content.centroids, path).shape[1]
    for name, part in (("mean", content.mean), ("std", content.std)):
        if part is not None and (part.shape != (width,) or not part.isfinite().all()):
            raise ValueError(
                f"{path}: {name} must be [{width}] as the centroids are wide, and finite; got {tuple(part.shape)}"
            )
    if content.std is not None and not (content.std > 0).all():
        raise ValueError(f"{path}: std must be positive: leave out, or set to one, what never varies")
    return content


def _checked_centroids(centroids: Tensor, path: Path) -> Tensor:
    if centroids.ndim != 2 or 0 in centroids.shape or not centroids.isfinite().all():
        raise ValueError(f"{path}: centroids must be [k, d] and finite, got {tuple(centroids.shape)}; {_PUBLISHED}")
    return centroids


class _JoblibArray(NumericArray):
    """An array whose bytes follow in the stream right behind its description, as joblib >= 0.10 writes them.

    Args:
        stream: The stream that the description is read from.
    """

    def __init__(self, stream: BytesIO) -> None:
        super().__init__()
        self._stream = stream

    def fill(self, state: Any) -> None:
        """Read the bytes: behind one that counts the padding, from joblib 1.2 on."""
        if not isinstance(state, dict):
            raise RefusedPickleError(f"is damaged: it describes no array; {_DOWNLOAD}")
        kind, shape = state.get("dtype"), state.get("shape")
        num_bytes = bytes_needed(kind, shape)
        if state.get("numpy_array_alignment_bytes") is not None:
            self._stream.read(int.from_bytes(self._stream.read(1), "little"))
        self.take(self._stream.read(num_bytes), kind, shape, state.get("order"))


def _classes(stream: BytesIO) -> dict[tuple[str, str], Any]:
    """What files of joblib and scikit-learn may name: their arrays, read from the stream, and plain data."""

    def array(*arguments: Any) -> _JoblibArray:
        return _JoblibArray(stream)

    def old_array(*arguments: Any) -> Any:
        raise RefusedPickleError(f"is in the format of joblib before 0.10, with arrays in other files; {_DUMP_AGAIN}")

    table = dict(PLAIN_CLASSES)
    for module in ("joblib.numpy_pickle", "sklearn.externals.joblib.numpy_pickle"):
        table[module, "NumpyArrayWrapper"] = array
        for suffix in ("", "_compat"):
            table |= {(f"{module}{suffix}", name): old_array for name in ("NDArrayWrapper", "ZNDArrayWrapper")}
    for name in ("memmap", "matrix"):
        table["numpy", name] = table["numpy", "ndarray"]
    return table


def _unpacked(file: IO[bytes]) -> bytes:
    """The whole of a file, unpacked where it is compressed."""
    start = file.read(8)
    file.seek(0)
    if start.startswith(_OLD_ZLIB):
        raise RefusedPickleError(f"is in the compressed format of joblib before 0.10; {_DUMP_AGAIN}")
    if start.startswith(_LZ4):
        raise RefusedPickleError(f"is compressed by lz4; {_DUMP_AGAIN} with compress='zlib'")
    parts, num_bytes = [], 0
    for part in _chunks(file, start):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > _MOST_BYTES:
            raise RefusedPickleError(f"is refused: it holds more than {_MOST_BYTES} bytes unpacked; {_PUBLISHED}")
    return b"".join(parts)


def _chunks(file: IO[bytes], start: bytes) -> Iterator[bytes]:
    """The content of a file piece by piece, so that a bomb is noticed before it is there."""
    if start.startswith((_ZLIB, _GZIP)):
        inflater = zlib.decompressobj(wbits=_ZLIB_OR_GZIP)
        while not inflater.eof:
            packed = inflater.unconsumed_tail or _next_chunk(file)
            yield inflater.decompress(packed, _CHUNK_BYTES)
    elif start.startswith((_BZ2, _LZMA, _XZ)):
        is_bz2 = start.startswith(_BZ2)
        unpacker: Any = bz2.BZ2Decompressor() if is_bz2 else lzma.LZMADecompressor(memlimit=_MOST_LZMA_BYTES)
        while not unpacker.eof:
            yield unpacker.decompress(_next_chunk(file) if unpacker.needs_input else b"", _CHUNK_BYTES)
    else:
        while part := file.read(_CHUNK_BYTES):
            yield part


def _next_chunk(file: IO[bytes]) -> bytes:
    packed = file.read(_CHUNK_BYTES)
    if not packed:
        raise EOFError("compressed data ends early")
    return packed
