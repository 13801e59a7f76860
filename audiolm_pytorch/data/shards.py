"""Token shards: arrays that frozen encoders compute once for a corpus, stored in files that are memory-mapped.

A shard folder contains `plan.json` (arguments of `write_shards`), the folders `chunk-00000`, `chunk-00001` and so on,
and `index.json` once all chunks are complete. For each field, a chunk folder contains one `.npy` file of all values and
one `.npy` file of record offsets. A chunk folder gets its final name when the chunk is complete, so that an interrupted
run continues with the first missing chunk. Every file of a chunk has a digest in the file `fields.json` of the chunk,
whose digest is in `index.json`; a chunk is checked when it is opened.
"""

import json
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from audiolm_pytorch.checks.types import described, typed
from audiolm_pytorch.data.claims import claims
from audiolm_pytorch.saving.files import (
    check_digest,
    differences,
    digest_of_file,
    read_json,
    read_versioned,
    write_json,
)
from audiolm_pytorch.saving.ownership import LOCK_FILE, check_overwrite
from audiolm_pytorch.saving.text import one_line

__all__ = ["TokenShards", "write_shards"]

_FORMAT_VERSION = 2
# Names of fields are parts of file names.
_FIELD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .-]{0,99}")
_FILE_SUFFIXES = (".npy", ".offsets.npy")
_PLAN_NAME, _INDEX_NAME, _FIELDS_NAME = "plan.json", "index.json", "fields.json"
_DTYPES = ("int16", "int32", "float16", "float32", "float64")
_FLOAT_TYPES = (np.float16, np.float32)
# Two maps per field stay open for every chunk in use; the usual limit is 1,024 open files per process.
_MAX_OPEN_CHUNKS = 64
_WAIT_SECONDS = 0.1

Record = dict[str, np.ndarray]


@typed
def write_shards(
    folder: str | Path,
    make_record: Callable[[int], Record],
    num_records: int,
    fingerprint: dict[str, Any],
    records_per_chunk: int = 256,
    while_waiting: Callable[[], object] = lambda: None,
) -> int:
    """Compute the records of a corpus and store them in chunks; return the number of chunks that this call computed.

    Complete chunks are not computed again. Any number of processes may write to the same folder; each of them takes the
    next chunk that no process is computing. The call returns when all chunks are complete; it computes the chunk of
    another process if that process ends.

    Args:
        make_record: Function that returns record number `i` as a dict of arrays. All records need the same field names;
            the shape of a field may differ in the first dimension only (time). Integers are stored as int16 or int32,
            and floats as float16 or float32; only a float64 array without dimensions (a scalar) remains float64.
        fingerprint: JSON-compatible description of the records; another fingerprint in `folder` is an error.
        records_per_chunk: Number of records per chunk; an interrupted process loses at most one chunk.
        while_waiting: Function that is called several times a second while other processes compute the last chunks.
    """
    if min(num_records, records_per_chunk) < 1:
        raise ValueError(
            f"shards need num_records >= 1 and records_per_chunk >= 1, got {num_records=}, {records_per_chunk=}"
        )
    folder = Path(folder)
    plan = {
        "format_version": _FORMAT_VERSION,
        "num_records": num_records,
        "records_per_chunk": records_per_chunk,
        "fingerprint": json.loads(json.dumps(fingerprint)),  # tuples become lists, as in the file
    }
    folder.mkdir(parents=True, exist_ok=True)
    check_overwrite(folder / _INDEX_NAME, ("format_version", "num_records", "chunks"))
    if (folder / _PLAN_NAME).is_file():
        complaint = f"{folder} contains records of other arguments; use another folder, or remove {folder}"
        _require_equal(read_json(folder / _PLAN_NAME), plan, complaint)
    else:
        write_json(folder / _PLAN_NAME, plan, sealed=True)
    chunks = [folder / f"chunk-{number:05d}" for number in range(-(-num_records // records_per_chunk))]
    num_computed = 0
    if (folder / _INDEX_NAME).is_file() and all(chunk.is_dir() for chunk in chunks):
        return 0
    with claims(folder) as claim:
        while missing := [number for number, chunk in enumerate(chunks) if not chunk.is_dir()]:
            for number in missing:
                chunk = chunks[number]
                # another process may complete the chunk before the claim
                if claim(number) and not chunk.is_dir():
                    for partial in folder.glob(f".{chunk.name}.*.partial"):  # of processes that were killed
                        shutil.rmtree(partial, ignore_errors=True)
                    first = number * records_per_chunk
                    last = min(first + records_per_chunk, num_records)
                    _write_chunk(chunk, [_storable(make_record(i), i) for i in range(first, last)], first)
                    num_computed += 1
            if not all(chunk.is_dir() for chunk in chunks):
                while_waiting()
                time.sleep(_WAIT_SECONDS)
    digests = [digest_of_file(chunk / _FIELDS_NAME) for chunk in chunks]
    write_json(folder / _INDEX_NAME, {**plan, "fields": _joint_fields(chunks), "chunks": digests}, sealed=True)
    (folder / LOCK_FILE).unlink(missing_ok=True)
    return num_computed


def _storable(record: Record, number: int) -> Record:
    """Convert the arrays of a record to the number types that shards can store."""
    if not isinstance(record, dict):
        raise TypeError(f"record {number}: make_record must return a dict of arrays, got {described(record)}")
    stored = {}
    for name, value in record.items():
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f"record {number}: the field name {name!r} cannot be part of a file name; use letters")
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"record {number}, field {name!r} is {array.dtype}; make_record must return numbers")
        if array.dtype.kind != "f":
            array = array.astype(_integer_type(array, number, name))
        elif not np.isfinite(array).all():
            raise ValueError(f"record {number}, field {name!r} is not finite; make_record must return finite values")
        elif array.dtype not in _FLOAT_TYPES and array.ndim:
            array = array.astype(np.float32)
        stored[name] = array
    return stored


def _integer_type(array: np.ndarray, number: int, name: str) -> type:
    """Return int16 if this type can store all values of an array, or else int32."""
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    for integer in (np.int16, np.int32):
        if np.iinfo(integer).min <= low and high <= np.iinfo(integer).max:
            return integer
    raise ValueError(f"record {number}, field {name!r} has values {low}..{high}, which int32 cannot store")


def _write_chunk(chunk: Path, records: list[Record], first: int) -> None:
    """Write a chunk to a temporary folder, then rename the folder; a chunk of another process is not replaced."""
    fields = {}
    partial = chunk.with_name(f".{chunk.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, array in records[0].items():
            column = _column(records, name, first)
            rows = [np.atleast_1d(value) for value in column]
            values = np.concatenate(rows)
            offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
            np.save(partial / f"{name}.npy", values, allow_pickle=False)
            np.save(partial / f"{name}.offsets.npy", offsets, allow_pickle=False)
            digests = [digest_of_file(partial / f"{name}{suffix}") for suffix in _FILE_SUFFIXES]
            shape, is_scalar = list(values.shape[1:]), array.ndim == 0
            fields[name] = {"dtype": values.dtype.name, "shape": shape, "scalar": is_scalar, "digests": digests}
        write_json(partial / _FIELDS_NAME, fields, sealed=True)
        try:
            partial.rename(chunk)
        except OSError:
            if not chunk.is_dir():
                raise
    except OSError as error:
        if error.filename is not None:
            raise
        reason = error.strerror or "the disk is full"  # numpy only reports how many values it has written
        raise OSError(error.errno, f"cannot write to {chunk.parent}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _column(records: list[Record], name: str, first: int) -> list[np.ndarray]:
    """Return the arrays of one field from all records, after a check of names and shapes."""
    names, shape = records[0].keys(), records[0][name].shape
    for number, record in enumerate(records, first):
        if record.keys() != names:
            raise ValueError(f"record {number} needs fields {sorted(names)} like record {first}, got {sorted(record)}")
        other = record[name].shape
        if other[1:] != shape[1:] or len(other) != len(shape):
            raise ValueError(
                f"field {name!r} of record {number} has shape {other}; it may differ from {shape} in dimension 0 only"
            )
    return [record[name] for record in records]


def _joint_fields(chunks: list[Path]) -> dict[str, dict[str, Any]]:
    """Return shape and number type of each field, with a type that can store the values of all chunks."""
    joint: dict[str, dict[str, Any]] = read_json(chunks[0] / _FIELDS_NAME)
    for chunk in chunks:
        fields = read_json(chunk / _FIELDS_NAME)
        layout, expected = (
            {name: (field["shape"], field["scalar"]) for name, field in part.items()} for part in (fields, joint)
        )
        _require_equal(layout, expected, f"{chunk} has other fields than {chunks[0]}")
        for name, field in fields.items():
            joint[name].pop("digests", None)
            joint[name]["dtype"] = np.result_type(joint[name]["dtype"], field["dtype"]).name
    return joint


def _require_equal(found: dict[str, Any], expected: dict[str, Any], complaint: str) -> None:
    """Check that two nested dicts are equal; the error message lists the differences."""
    if lines := differences(found, expected):
        raise ValueError(f"{complaint}: " + "; ".join(lines))


class TokenShards:
    """Sequence of the records that `write_shards` stored, read from memory-mapped files.

    Args:
        expect_fingerprint: Required fingerprint of the records; None accepts any fingerprint.
        max_open_chunks: Maximum number of chunks that stay memory-mapped; more chunks use more memory.
    """

    @typed
    def __init__(
        self,
        folder: str | Path,
        expect_fingerprint: dict[str, Any] | None = None,
        max_open_chunks: int = _MAX_OPEN_CHUNKS,
    ) -> None:
        if max_open_chunks < 1:
            raise ValueError(f"max_open_chunks must be at least 1, got {max_open_chunks}")
        self.folder = Path(folder)
        if not (self.folder / _INDEX_NAME).is_file():
            is_begun = (self.folder / _PLAN_NAME).is_file()
            state = "unfinished: run write_shards again" if is_begun else "not a shard folder"
            raise ValueError(f"{self.folder}: no {_INDEX_NAME} ({state})")
        index = _checked_index(self.folder)
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        if expect_fingerprint is not None:
            expected = json.loads(json.dumps(expect_fingerprint))
            _require_equal(
                self.fingerprint, expected, f"{self.folder} holds tokens of another origin; write them again"
            )
        self.digest = digest_of_file(self.folder / _INDEX_NAME)[:16]
        self._num_records: int = index["num_records"]
        self._records_per_chunk: int = index["records_per_chunk"]
        self._fields: dict[str, dict[str, Any]] = index["fields"]
        self._chunk_digests: list[str] = index["chunks"]
        self._checked: dict[int, list[tuple[int, ...]]] = {}  # states of the files of a chunk when it was checked
        self._max_open_chunks = max_open_chunks
        self._open: OrderedDict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = OrderedDict()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of every record."""
        return tuple(self._fields)

    def __len__(self) -> int:
        """Number of records."""
        return self._num_records

    def longest(self, field: str) -> int:
        """Return the largest number of rows of a field in any record."""
        if field not in self._fields:
            raise ValueError(f"{self.folder} has no field {field!r}, it has {list(self._fields)}")
        lengths = []
        for number in range(len(self._chunk_digests)):
            self._check_chunk(number)
            lengths.append(int(np.diff(self._offsets(number, field)).max()))
        return max(lengths)

    def __getitem__(self, index: int) -> Record:
        """Read a record as a dict of arrays, which are copies in memory."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is out of range; {self.folder} has {len(self)} records")
        number, row = divmod(index, self._records_per_chunk)
        record = {}
        for name, (rows, offsets) in self._chunk(number).items():
            field, (start, stop) = self._fields[name], offsets[row : row + 2]
            values = np.array(rows[start:stop], dtype=field["dtype"])
            record[name] = values.reshape(()) if field["scalar"] else values
        return record

    def _chunk(self, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return values and record offsets of each field of a chunk; recently used chunks stay memory-mapped."""
        if number not in self._open:
            self._check_chunk(number)
            self._open[number] = {name: self._arrays(number, name) for name in self._fields}
            if len(self._open) > self._max_open_chunks:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}"

    def _check_chunk(self, number: int) -> None:
        """Check the digests of all files of a chunk, unless they were checked and have not changed since.

        A changed file raises a ValueError.
        """
        file = self._folder_of(number) / _FIELDS_NAME
        files = [file.with_name(f"{name}{end}") for name in self._fields for end in _FILE_SUFFIXES]
        states = [_state(path) for path in files]
        if self._checked.get(number) == states:
            return
        try:
            check_digest(file, self._chunk_digests[number])
            for name, field in read_json(file).items():
                for end, digest in zip(_FILE_SUFFIXES, field["digests"]):
                    check_digest(file.with_name(f"{name}{end}"), digest)
        except ValueError as error:
            again = f"or delete {file.parent} and {_INDEX_NAME}, and write the shards again"
            raise ValueError(f"{error}, {again}") from error
        self._checked[number] = states

    def _offsets(self, number: int, name: str) -> np.ndarray:
        """Read the record offsets of a field of a checked chunk, and check that they ascend."""
        path = self._folder_of(number) / f"{name}.offsets.npy"
        first = number * self._records_per_chunk
        num_records = min(self._records_per_chunk, self._num_records - first)
        offsets = _load(path, mapped=False)
        if (
            offsets.dtype != np.int64
            or offsets.shape != (num_records + 1,)
            or offsets[0]
            or (np.diff(offsets) < 0).any()
        ):
            raise ValueError(f"{path} must contain {num_records + 1} ascending offsets; write the shards again")
        return offsets

    def _arrays(self, number: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        path, field = self._folder_of(number) / f"{name}.npy", self._fields[name]
        offsets, values = self._offsets(number, name), _load(path, mapped=True)
        if values.dtype.kind not in "if" or values.shape != (int(offsets[-1]), *field["shape"]):
            raise ValueError(
                f"{path} has {values.dtype} values of shape {values.shape}, but the index needs "
                f"{(int(offsets[-1]), *field['shape'])}; write the shards again"
            )
        return values, offsets


def _state(file: Path) -> tuple[int, ...]:
    """Return what changes if a file is written or replaced; () for a missing file."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _checked_index(folder: Path) -> dict[str, Any]:
    """Read the index of a shard folder, and check its numbers and the names and types of its fields."""
    path = folder / _INDEX_NAME
    index = read_versioned(path, _FORMAT_VERSION)
    numbers: list[Any] = [index.get(name) for name in ("num_records", "records_per_chunk")]
    fields, chunks, fingerprint = (index.get(name) for name in ("fields", "chunks", "fingerprint"))
    is_valid = (
        all(type(number) is int and number >= 1 for number in numbers)
        and isinstance(fingerprint, dict)
        and isinstance(fields, dict)
        and all(_FIELD_NAME.fullmatch(name) and _is_field(field) for name, field in fields.items())
        and isinstance(chunks, list)
        and all(isinstance(chunk, str) for chunk in chunks)
        and len(chunks) == -(-numbers[0] // numbers[1])
    )
    if not is_valid:
        raise ValueError(f"{path} is not an index of token shards; write the shards again")
    return index


def _is_field(field: Any) -> bool:
    """Return whether a value describes number type and shape of a field."""
    return (
        isinstance(field, dict)
        and field.get("dtype") in _DTYPES
        and isinstance(field.get("scalar"), bool)
        and isinstance(field.get("shape"), list)
        and all(type(size) is int and 0 <= size < 2**31 for size in field["shape"])
    )


def _load(path: Path, mapped: bool) -> np.ndarray:
    """Read or memory-map an array from a file; an empty array cannot be mapped and is read instead."""
    try:
        if mapped:
            try:
                return np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError:
                pass
        return np.load(path, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python text, which raises errors of many kinds
        raise ValueError(f"{path} is not a readable array ({one_line(error)}); write the shards again") from error
