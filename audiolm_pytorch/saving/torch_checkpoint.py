"""Checkpoints of torch that hold more than tensors, read as data: nothing in them is imported or run.

Both formats are read here, the zip archive of torch >= 1.6 and the plain file before it (published wav2vec models are
in that). torch's own loader with a restricted unpickler would do, were it not that it starts programs from archives
that hold some, trusts the sizes that a file declares, and writes files for formats before 2017.
"""

import io
import mmap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.saving.pickled_values import PLAIN_CLASSES
from audiolm_pytorch.saving.restricted_pickle import (
    RefusedPickleError,
    RestrictedUnpickler,
    StandInClass,
    UnreadableFileError,
    checked_file,
    one_line_errors,
)

__all__ = ["read_torch_checkpoint"]

_ROOTS = ("argparse", "fairseq", "numpy.random", "omegaconf", "typing")
_DOWNLOAD = "download or copy it again"
_ZIP_START = b"PK\x03\x04"
_TAR_MARK, _TAR_PLACE = b"ustar", 257
# How files before torch 1.6 start: this number, a version, and facts about the machine that wrote them.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MOST_AXES, _MOST_NUMBERS = 64, 2**63
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, eq=False, repr=False)
class _StorageKind:
    """The type of the numbers in a storage."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False, repr=False)
class _Storage:
    """Bytes `[n]` of a storage and the type of the numbers in them."""

    data: Tensor
    dtype: torch.dtype


@beartype
def read_torch_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint of torch, tensors on the CPU, without running anything that it names.

    Args:
        path: A file written by `torch.save`, of any release since 0.4.

    Returns:
        What it holds: tensors, plain containers, numbers, text, `NumericArray`, and a `StandIn` for each object of
        fairseq, omegaconf or argparse.

    Raises:
        ValueError: If it is missing, damaged, no such checkpoint, or names anything else; one line with the mend.
    """
    path = checked_file(path, "give a checkpoint written by torch.save")
    with path.open("rb") as file:
        start = file.read(_TAR_PLACE + len(_TAR_MARK))
    with one_line_errors(path):
        if start.startswith(_ZIP_START):
            with zipfile.ZipFile(path) as archive:
                return _read_archive(archive, path)
        if start[_TAR_PLACE:] == _TAR_MARK:
            raise RefusedPickleError(
                "is a tar archive; files of torch before 0.4 are not read: write it with a newer one"
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_legacy(mapped, path)


class _Storages:
    """The storages of one file, read once each and never more bytes than the file has.

    Args:
        read: Key and number of bytes to the bytes `[n]`.
        num_bytes: Size of the file.
    """

    def __init__(self, read: Callable[[str, int], Tensor], num_bytes: int) -> None:
        self._read = read
        self._left = num_bytes
        self.kinds: dict[str, torch.dtype] = {}
        self.data: dict[str, Tensor] = {}

    def find(self, reference: Any) -> _Storage:
        """Answer a reference out of a pickle: ("storage", type, key, device, count[, view])."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise RefusedPickleError("is refused: it refers to something that is no storage of numbers")
        _, kind, key, _, count, *view = reference
        if view not in ([], [None]):
            raise RefusedPickleError("holds views of storages, as torch before 0.4 wrote; write it with a newer torch")
        if not isinstance(kind, _StorageKind) or not isinstance(key, str) or type(count) is not int or count < 0:
            raise RefusedPickleError("is damaged: it refers to a storage without a proper type, key and size")
        num_bytes = count * kind.dtype.itemsize
        if key not in self.data:
            self._left -= num_bytes
            if self._left < 0:
                raise RefusedPickleError(f"is damaged: it declares tensors of more bytes than it has; {_DOWNLOAD}")
            self.kinds[key], self.data[key] = kind.dtype, self._read(key, num_bytes)
        if len(self.data[key]) != num_bytes:
            raise RefusedPickleError(
                f"is damaged: storage {key[:40]!r} is not of the size that it declares; {_DOWNLOAD}"
            )
        return _Storage(self.data[key], kind.dtype)


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    """Read the zip format: `name/data.pkl`, and a record `name/data/key` for each storage."""
    records = {info.filename: info for info in archive.infolist()}
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in records):
        raise RefusedPickleError(
            "is a TorchScript archive, which is a program; give a checkpoint written by torch.save"
        )
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedPickleError("is a zip archive, but no checkpoint of torch; give one written by torch.save")
    prefix = pickles[0].removesuffix("data.pkl")

    def contents(name: str) -> bytearray:
        info = records.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
            raise RefusedPickleError(
                f"is damaged: record {name[:80]!r} is missing or not as torch writes it; {_DOWNLOAD}"
            )
        made, record = bytearray(info.file_size), cast(io.BufferedIOBase, archive.open(info))
        with record:
            if record.readinto(made) != len(made) or record.read(1):  # the last read checks the record's sum
                raise EOFError(f"record {name[:80]!r} ends early")
        return made

    if f"{prefix}byteorder" in records and contents(f"{prefix}byteorder") != b"little":
        raise RefusedPickleError("was written on a big-endian machine; write it again on a little-endian one")
    storages = _Storages(lambda key, num_bytes: _bytes(contents(f"{prefix}data/{key}")), path.stat().st_size)
    return _unpickled(io.BytesIO(contents(pickles[0])), path, storages)


def _read_legacy(mapped: mmap.mmap, path: Path) -> Any:
    """Read the format before torch 1.6: magic, version, machine, object, keys, then size and bytes of each storage."""
    storages = _Storages(lambda key, num_bytes: torch.zeros(num_bytes, dtype=torch.uint8), len(mapped))
    try:
        magic = RestrictedUnpickler(mapped, {}, (), source="it").load()
    except UnreadableFileError as error:
        raise RefusedPickleError(f"is no checkpoint of torch ({error}); give one written by torch.save") from error
    if magic != _LEGACY_MAGIC:
        raise RefusedPickleError("is no checkpoint of torch; give one written by torch.save")
    version, machine = (RestrictedUnpickler(mapped, {}, (), source=path).load() for _ in range(2))
    if version != _LEGACY_VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise RefusedPickleError("is of another version or a big-endian machine; write it again with a newer torch")
    found = _unpickled(mapped, path, storages)
    keys = RestrictedUnpickler(mapped, {}, (), source=path).load()
    are_names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not are_names or sorted(keys) != sorted(storages.data):
        raise RefusedPickleError(f"is damaged: the storages that follow are not those that it refers to; {_DOWNLOAD}")
    for key in keys:
        target = storages.data[key]
        count = int.from_bytes(mapped.read(8), "little", signed=True)
        data = mapped.read(len(target))
        if count * storages.kinds[key].itemsize != len(target) or len(data) != len(target):
            raise RefusedPickleError(f"is damaged or cut short in storage {key[:40]!r}; {_DOWNLOAD}")
        target.copy_(_bytes(bytearray(data)))
    return found


def _unpickled(file: Any, path: Path, storages: _Storages) -> Any:
    return RestrictedUnpickler(file, _CLASSES, _ROOTS, source=path, persistent_load=storages.find).load()


def _bytes(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, wants_grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Tensor:
    """A tensor within its storage; whether it wants gradients, and its hooks, are not data."""
    if metadata:
        raise RefusedPickleError("holds a conjugated or negated view; write it again with `tensor.resolve_conj()`")
    is_proper = isinstance(storage, _Storage) and len(size) == len(stride) and len(size) <= _MOST_AXES
    if not is_proper or not all(type(n) is int and 0 <= n < _MOST_NUMBERS for n in (offset, *size, *stride)):
        raise RefusedPickleError("is damaged: it holds a tensor without a proper size")
    values = storage.data.view(storage.dtype)
    if 0 in size:
        return values.new_empty(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if last >= len(values) or prod(size) > len(values):
        raise RefusedPickleError(f"is damaged: it holds a tensor that is larger than its storage; {_DOWNLOAD}")
    return values.as_strided(size, stride, offset)


def _tensor_of_type(
    storage: Any, offset: Any, size: Any, stride: Any, wants_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    """A tensor of a type that has no storage of its own, as newer releases of torch write it."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype) or len(storage.data) % dtype.itemsize:
        raise RefusedPickleError("is damaged: it holds a tensor without a proper type")
    return _tensor(_Storage(storage.data, dtype), offset, size, stride, metadata=metadata)


def _parameter(data: Any, *flags: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise RefusedPickleError("is damaged: it holds a parameter that is no tensor")
    return data


def _size(lengths: Any = ()) -> tuple[Any, ...]:
    if not isinstance(lengths, tuple | list) or len(lengths) > _MOST_AXES:
        raise RefusedPickleError("is damaged: it holds a size that no tensor has")
    return tuple(lengths)


def _torch_classes() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): _size,
        ("torch", "device"): StandInClass("torch.device"),
        ("torch.torch_version", "TorchVersion"): StandInClass("torch.torch_version.TorchVersion"),
        # what annotations in omegaconf's metadata are pickled by
        ("_operator", "getitem"): StandInClass("operator.getitem"),
    }
    for name, dtype in _STORAGES.items():
        table |= {(module, name): _StorageKind(dtype) for module in ("torch", "torch.cuda", "torch.storage")}
    for dtype in {*_STORAGES.values()}:
        table["torch", str(dtype).removeprefix("torch.")] = dtype
    return table


_CLASSES = {**PLAIN_CLASSES, **_torch_classes()}
