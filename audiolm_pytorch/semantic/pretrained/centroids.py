"""Read published k-means centroids from a scikit-learn k-means saved by joblib, or from a safetensors file."""

import bz2
import io
import lzma
import re
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import read_weights
from audiolm_pytorch.saving.restricted_pickle import DataUnpickler, RefusedFileError, StandIn, one_line_errors

__all__ = ["read_centroids"]

_ADVICE = (
    "give a k-means as published (hubert_base_ls960_L9_km500.bin), write it again with joblib.dump(kmeans, path), or "
    "give centroids in a .safetensors file"
)
_ROOTS = ("sklearn", "numpy.random")
_WRAPPERS = ("joblib.numpy_pickle.NumpyArrayWrapper", "sklearn.externals.joblib.numpy_pickle.NumpyArrayWrapper")
_NAMES = (
    *_WRAPPERS,
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "memmap", "matrix")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "set", "int", "float", "str", "bool", "bytes")),
    "collections.OrderedDict",
    "_codecs.encode",
)
_NUMBER_TYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|c8|c16)")
_TORCH_START = b"PK\x03\x04"  # the zip archive of torch.save
# The published file has 3 MB; a compressed file of a few kB may declare any size.
_MAX_BYTES = 2**28
_ZLIB_OR_GZIP = 32 + 15


@typed
def read_centroids(path: str | Path) -> dict[str, Tensor]:
    """Read k-means centroids from a file, without running code in the file.

    The file has a KMeans or MiniBatchKMeans of scikit-learn that joblib saved, possibly compressed (zlib, gzip, bz2,
    lzma, xz). A `.safetensors` file has `centroids [k, d]`, and `mean [d]` and `std [d]` if features are normalised.
    The tensors are returned in float32.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        tensors, _ = read_weights(path)
        if "centroids" not in tensors or set(tensors) - {"centroids", "mean", "std"}:
            raise ValueError(
                f"{path} has the tensors {sorted(tensors)[:8]}; a file needs centroids, and may have mean and std"
            )
    else:
        with one_line_errors(path, _ADVICE):
            tensors = {"centroids": _kmeans_centroids(_unpacked(path))}
    shape = tuple(tensors["centroids"].shape)
    if len(shape) != 2 or 0 in shape or not tensors["centroids"].isfinite().all():
        raise ValueError(f"{path}: centroids must be [k, d] and finite, got shape {shape}; {_ADVICE}")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _kmeans_centroids(data: bytes) -> Tensor:
    kmeans = _JoblibUnpickler(data).load()
    state = kmeans.state if isinstance(kmeans, StandIn) else None
    centroids = state.get("cluster_centers_") if isinstance(state, dict) else None
    if not isinstance(centroids, np.ndarray):
        name = kmeans.name[:80] if isinstance(kmeans, StandIn) else type(kmeans).__name__
        raise RefusedFileError(f"the file has a {name} without cluster_centers_, but a fitted k-means is needed")
    if centroids.dtype.kind != "f":
        raise RefusedFileError(f"the file has centroids of type {centroids.dtype}, but floats are needed")
    return torch.from_numpy(centroids.astype("float32", order="C"))


class _JoblibUnpickler(DataUnpickler):
    """Unpickler for files of joblib 0.10 and later, in which the bytes of an array follow its pickled description."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)
        super().__init__(self._stream, _NAMES, _ROOTS)

    def finish(self, stand_in: StandIn) -> Any:
        """Replace the description of an array by the array, whose bytes follow its description in the file."""
        if stand_in.name not in _WRAPPERS:
            return stand_in
        shape, order = stand_in.state["shape"], stand_in.state["order"]
        dtype = _number_type(stand_in.state["dtype"])
        if stand_in.state.get("numpy_array_alignment_bytes") is not None:  # since joblib 1.2
            padding = int.from_bytes(self._stream.read(1), "little")
            self._stream.read(padding)
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array in the file has no valid shape")
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes > len(self._stream.getbuffer()) - self._stream.tell():
            raise ValueError("the file ends before the end of an array")
        numbers = np.frombuffer(self._stream.read(num_bytes), dtype=dtype)
        return numbers.reshape(shape[::-1]).transpose() if order == "F" else numbers.reshape(shape)


def _number_type(stand_in: Any) -> "np.dtype[Any]":
    """Return the dtype of a pickled `numpy.dtype`; object dtypes are rejected, because object arrays are pickles."""
    code = stand_in.arguments[0]
    if isinstance(code, str) and code.lstrip("|<>=").startswith("O"):
        raise RefusedFileError("the file is refused: it has an array of Python objects, which contains a pickle")
    _, byte_order, *structure = stand_in.state
    if not isinstance(code, str) or not _NUMBER_TYPE.fullmatch(code) or structure[:3] != [None, None, None]:
        raise RefusedFileError("the file is refused: it has an array whose values are not numbers")
    return np.dtype(code).newbyteorder(byte_order)


def _unpacked(path: Path) -> bytes:
    """Read and decompress a file; raise an error if the content has more than `_MAX_BYTES` bytes."""
    too_large = RefusedFileError(f"the file is refused: it has more than {_MAX_BYTES} bytes unpacked")
    if path.stat().st_size > _MAX_BYTES:
        raise too_large
    data = path.read_bytes()
    if data.startswith(_TORCH_START):
        raise RefusedFileError("the file is a torch checkpoint, not a k-means; check the order of the two paths")
    if data.startswith((b"ZF", b"\x04\x22\x4d\x18")):
        raise RefusedFileError("the file is compressed by joblib before 0.10 or by lz4, which cannot be read")
    decompressor: Any = None
    if data.startswith((b"\x78", b"\x1f\x8b")):
        decompressor = zlib.decompressobj(wbits=_ZLIB_OR_GZIP)
    elif data.startswith(b"BZ"):
        decompressor = bz2.BZ2Decompressor()
    elif data.startswith((b"\x5d\x00", b"\xfd7zXZ")):
        # The settings of joblib need 64 MB; a file may ask for gigabytes.
        decompressor = lzma.LZMADecompressor(memlimit=2**28)
    if decompressor is not None:
        data = decompressor.decompress(data, _MAX_BYTES + 1)
        if len(data) <= _MAX_BYTES and not decompressor.eof:
            raise EOFError("compressed data ends early")
    if len(data) > _MAX_BYTES:
        raise too_large
    return data
