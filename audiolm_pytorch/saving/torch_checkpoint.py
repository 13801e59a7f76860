"""Read torch checkpoints that contain objects of any class, without running code (see `restricted_pickle`).

Both formats of `torch.save` can be read: the zip archive since torch 1.6, and the older format, which published
wav2vec models use.
"""

import io
import mmap
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.restricted_pickle import (
    ClassName,
    DataUnpickler,
    RefusedFileError,
    StandIn,
    one_line_errors,
)

__all__ = ["TorchCheckpoint"]

_ADVICE = "give the checkpoint as published, written by torch.save"
_ZIP_START = b"PK\x03\x04"
_TAR_MARK, _TAR_OFFSET = b"ustar", 257
# The first two pickles of a file in the format before torch 1.6.
_LEGACY_START = [0x1950A86A20F9469CFC6C, 1001]
_STORAGE_DTYPES = {
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
}
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETER = "torch._utils._rebuild_parameter"
_BUILTINS = "dict list tuple set int float str bool bytes".split()
_ROOTS = ("argparse", "fairseq", "numpy.random", "omegaconf", "typing")
_NAMES = (
    *_TENSORS,
    _PARAMETER,
    *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in _STORAGE_DTYPES),
    *(str(dtype) for dtype in _STORAGE_DTYPES.values()),
    *"torch.Size torch.device torch.torch_version.TorchVersion collections.OrderedDict collections.defaultdict".split(),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
    # Numbers and arrays of numpy, and the generic types in the metadata of omegaconf.
    *"numpy.dtype numpy.ndarray _codecs.encode _operator.getitem".split(),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


class _Storage(NamedTuple):
    """Reference to a tensor storage in a checkpoint file."""

    key: str
    dtype: torch.dtype
    num_values: int


class TorchCheckpoint:
    """The dictionary in a file written by `torch.save` (torch 0.4 or later); no code in the file is run.

    The dictionary `content` has containers, numbers and text, and a `StandIn` for every other object. A ValueError is
    raised if an object in the file is neither a tensor nor of a class of Python, fairseq, omegaconf or argparse.
    """

    @typed
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._storages: dict[str, Tensor] = {}
        with one_line_errors(self.path, _ADVICE), self.path.open("rb") as file:
            self._record_bytes_left = self.path.stat().st_size
            start = file.read(_TAR_OFFSET + len(_TAR_MARK))
            if start.startswith(_ZIP_START):
                self.content = self._read_archive()
            elif start[_TAR_OFFSET:] == _TAR_MARK:
                raise RefusedFileError("the file is a tar archive of torch before 0.4, which cannot be read")
            else:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    self.content = self._read_legacy(mapped)
            if type(self.content) is not dict:
                raise RefusedFileError("the file is not a checkpoint of torch: the saved object is not a dictionary")

    @typed
    def tensor(self, value: Any) -> Tensor:
        """Convert a `StandIn` in `content` to a tensor on the CPU, which may share memory with other tensors."""
        with one_line_errors(self.path, _ADVICE):
            if type(value) is StandIn and value.name == _PARAMETER:
                value = value.arguments[0]
            if type(value) is not StandIn or value.name not in _TENSORS:
                raise RefusedFileError(f"the file is refused: it has a {type(value).__name__} where a tensor belongs")
            storage, offset, size, stride, *more = value.arguments
            if len(more) > 2 and more[2]:
                raise RefusedFileError(
                    "the file has a conjugated or negated tensor; save it again after resolve_conj()"
                )
            numbers = (offset, *size, *stride)
            if type(storage) is not _Storage or not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a tensor in the file has no valid size, stride and offset")
            last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            is_inside = 0 in size or (last < storage.num_values and prod(size) <= storage.num_values)
            if not is_inside or len(size) > 64:
                raise ValueError("a tensor in the file is larger than its storage")
            values = self._storages[storage.key].view(storage.dtype)
            return values.new_empty(size) if 0 in size else values.as_strided(size, stride, offset)

    def _read_archive(self) -> Any:
        """Read a zip archive with a pickle `name/data.pkl` and a record `name/data/key` for each tensor storage."""
        with zipfile.ZipFile(self.path) as archive:
            records = {info.filename: info for info in archive.infolist()}
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in records):
                raise RefusedFileError("the file is refused: it is a TorchScript archive, which contains code")
            pickles = [name for name in records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise RefusedFileError("the file is a zip archive, but not a checkpoint of torch")
            prefix = pickles[0].removesuffix("data.pkl")

            def record(name: str) -> bytearray:
                info = records.get(name)
                if info is None or info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"the record {name[:80]!r} of the zip archive is missing or compressed")
                self._record_bytes_left -= info.file_size
                if self._record_bytes_left < 0:
                    raise ValueError("the records of the zip archive are larger than the file")
                return bytearray(archive.read(info))

            if f"{prefix}byteorder" in records and record(f"{prefix}byteorder") != b"little":
                raise RefusedFileError("the file was written on a big-endian machine, which is not supported")
            unpickler = _TensorUnpickler(io.BytesIO(record(pickles[0])))
            content = unpickler.load()
            for key, storage in unpickler.storages.items():
                self._add_storage(storage, record(f"{prefix}data/{key}"))
        return content

    def _read_legacy(self, mapped: mmap.mmap) -> Any:
        """Read a file of torch before 1.6, which has header, machine type, object, storage keys and storage data."""
        try:
            start = [DataUnpickler(mapped, (), ()).load() for _ in _LEGACY_START]
        except Exception as error:
            raise RefusedFileError(f"the file is not a checkpoint of torch ({error})") from error
        if start != _LEGACY_START:
            raise RefusedFileError("the file is not a checkpoint of torch")
        machine = DataUnpickler(mapped, (), ()).load()
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise RefusedFileError("the file was written on a big-endian machine, which is not supported")
        unpickler = _TensorUnpickler(mapped)
        content = unpickler.load()
        keys = DataUnpickler(mapped, (), ()).load()
        are_names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not are_names or sorted(keys) != sorted(unpickler.storages):
            raise ValueError("the tensor storages that the file lists are not those of its tensors")
        for key in keys:
            storage = unpickler.storages[key]
            num_bytes = storage.num_values * storage.dtype.itemsize
            if int.from_bytes(mapped.read(8), "little") != storage.num_values:
                raise ValueError(f"the tensor storage {key[:40]!r} does not have the size that its tensors need")
            self._add_storage(storage, bytearray(mapped.read(num_bytes)))
        return content

    def _add_storage(self, storage: _Storage, data: bytearray) -> None:
        if len(data) != storage.num_values * storage.dtype.itemsize:
            raise ValueError(f"the tensor storage {storage.key[:40]!r} does not have the size that its tensors need")
        self._storages[storage.key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()


class _TensorUnpickler(DataUnpickler):
    """Unpickler for the object in a torch checkpoint; `storages` collects the referenced tensor storages by key."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, _NAMES, _ROOTS)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, reference: Any) -> _Storage:
        """Return the storage of a pickled reference ("storage", type, key, device, count[, view])."""
        if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
            raise RefusedFileError("the file is refused: it has a reference to an object that is not a tensor storage")
        _, kind, key, _, count, *view = reference
        dtype = _STORAGE_DTYPES.get(kind.name.rpartition(".")[2]) if type(kind) is ClassName else None
        if dtype is None or type(key) is not str or type(count) is not int or count < 0 or view not in ([], [None]):
            raise ValueError("a reference to a tensor storage has no valid type, key and size")
        storage = _Storage(key, dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"the tensor storage {key[:40]!r} has two different sizes or types")
        return storage
