"""Read JSON and safetensors files, and replace them atomically: write a temporary file, sync it to disk, rename it.

A sealed JSON file contains its own SHA-256, and can contain the SHA-256 of other files of its folder, so that a changed
bit in any of the files is an error.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from audiolm_pytorch.checks.damage import LFS_POINTER, POINTER_REASON
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.fingerprint import digest_of
from audiolm_pytorch.saving.text import one_line

__all__ = [
    "check_digest",
    "check_seal",
    "check_version",
    "differences",
    "digest_of_file",
    "open_weights",
    "read_json",
    "read_versioned",
    "read_weights",
    "save_tensors",
    "staged_files",
    "sync_to_disk",
    "temporary_folder",
    "write_json",
    "write_weights",
]

# The JSON files of this library are smaller. Each container needs up to 100 bytes of memory.
_MAX_JSON_BYTES, _MAX_JSON_CONTAINERS = 2**26, 2**21
_SEAL = "sha256"
_STAGE_PREFIX = ".writing-"
# While the digest of a sealed file is computed, zeros take its place.
_NO_DIGEST = "0" * 64
_TEMPORARY = ".tensors"
# Any name of six characters: the digest covers its own name.
_SEALED_END = re.compile(r'"[^\n]{6}": "([0-9a-f]{64})"\n}\n\Z')

# Number types of safetensors files. Types of less than 8 bits are not supported.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}


@typed
def write_json(path: str | Path, obj: Any, sealed: bool = False) -> None:
    """Write a JSON-able object to a file, which is replaced atomically; raise a ValueError for NaN and infinity.

    If `sealed`, the object must be a dict. The file then ends with an entry "sha256", which `read_json` checks and
    removes.
    """
    path = Path(path)
    try:
        text = json.dumps({**obj, _SEAL: _NO_DIGEST} if sealed else obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path}: the object cannot be stored as JSON ({error})") from error
    # A file name that is not UTF-8 has surrogates, which JSON can only contain as escapes.
    data = (text + "\n").encode(errors="backslashreplace")
    if sealed:
        digest = hashlib.sha256(data).hexdigest()
        data = digest.encode().join(data.rsplit(_NO_DIGEST.encode(), 1))
    with staged_files(path.parent) as stage:
        (stage / path.name).write_bytes(data)


@typed
def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise a ValueError if the file is missing or damaged, or if its "sha256" is wrong."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    num_bytes = Path(path).stat().st_size
    if num_bytes > _MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {num_bytes} bytes, but JSON files have at most {_MAX_JSON_BYTES}; restore the file"
        )
    try:
        text = Path(path).read_bytes().decode()
        if text.count("[") + text.count("{") > _MAX_JSON_CONTAINERS:
            raise ValueError(f"more than {_MAX_JSON_CONTAINERS} lists and dicts")
        obj = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(f"{path} is not a JSON file: {one_line(error)}") from error
    seal = _SEALED_END.search(text)
    has_seal = isinstance(obj, dict) and isinstance(obj.get(_SEAL), str)
    if seal is None and not has_seal:
        return obj
    if seal is not None:
        unsealed = text[: seal.start(1)] + _NO_DIGEST + text[seal.end(1) :]
        has_seal = has_seal and hashlib.sha256(unsealed.encode()).hexdigest() == seal[1]
    if seal is None or not has_seal:
        raise ValueError(
            f"{path} has changed since it was written, its SHA-256 differs; restore the file, or remove the line "
            f'"{_SEAL}" to use your own changes'
        )
    del obj[_SEAL]
    return obj


@typed
def read_versioned(path: str | Path, version: int) -> dict[str, Any]:
    """Read a JSON file as `read_json` does, and check with `check_version` that it contains a dict."""
    return check_version(read_json(path), version, path)


@typed
def check_version(content: Any, version: int, source: str | Path) -> dict[str, Any]:
    """Check that the content of the file `source` is a dict with this entry "format_version", and return the dict."""
    found = content.get("format_version") if isinstance(content, dict) else None
    if type(found) is not int or found != version:
        raise ValueError(
            f"{source} has format_version {found!r:.40}, but this release of the library reads {version}; install the "
            "release that wrote the file, or write the file again"
        )
    return dict(content)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


@typed
def digest_of_file(path: str | Path) -> str:
    """Return the SHA-256 of the bytes of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@typed
def check_digest(path: str | Path, expected: str) -> None:
    """Raise a ValueError if a file is missing, or its SHA-256 is not the expected one."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    if digest_of_file(path) != expected:
        _check_no_pointer(Path(path))
        raise ValueError(f"{path} has changed since it was written, its SHA-256 differs; restore the file")


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Return one line for each difference of two JSON values, such as `settings.seed: found 0, expected 1`."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return [] if found == expected else [f"{path}: found {found}, expected {expected}"]
    lines = []
    for name in sorted({**found, **expected}):
        values = found.get(name, "nothing"), expected.get(name, "nothing")
        lines += differences(*values, f"{path}.{name}" if path else name)
    return lines


@typed
def write_weights(
    path: str | Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    sealed: bool = False,
) -> None:
    """Write named tensors and the header strings `metadata` to a safetensors file, which is replaced atomically.

    The tensors may be on any device, but must not share memory; `weights_of` returns such tensors. The header of a
    `sealed` file has a digest of the tensors and of `metadata`, which `read_weights` and `check_seal` check.
    """
    path = Path(path)
    if sealed:
        metadata = {**(metadata or {}), _SEAL: digest_of(metadata or {}, weights)}
    with staged_files(path.parent) as stage:
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_tensors(stage / path.name, contiguous, metadata or {})


def save_tensors(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, not atomically; a full disk raises an OSError."""
    try:
        with _utf8_link(path.parent) as folder:
            # safetensors would write invalid JSON for {}
            save_file(dict(weights), folder / _TEMPORARY, metadata=dict(metadata) or None)
        os.replace(path.with_name(_TEMPORARY), path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


@typed
def read_weights(path: str | Path, sealed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (on the CPU) and header strings of a safetensors file; raise a ValueError if the file is damaged.

    If `sealed`, the file must have been written with `sealed`.
    """
    with open_weights(path) as file:
        tensors, metadata = file.tensors(), file.metadata
    if sealed:
        check_seal(path, tensors, metadata)
    return tensors, metadata


@typed
def check_seal(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise a ValueError unless these tensors and header strings are those of a file written with `sealed`."""
    unsealed = {name: text for name, text in metadata.items() if name != _SEAL}
    if metadata.get(_SEAL) != digest_of(unsealed, tensors):
        raise ValueError(f"{path} has changed since it was written, its digest differs; restore the file")


class WeightsFile:
    """An open safetensors file: its header strings, and dtype and shape of its tensors by name."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.metadata: dict[str, str] = dict(opened.metadata() or {})
        slices = {name: opened.get_slice(name) for name in opened.keys()}
        self.facts = {name: (_DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors on the CPU."""
        return {name: self._opened.get_tensor(name) for name in self.facts}


@contextmanager
def open_weights(path: str | Path) -> Iterator[WeightsFile]:
    """Open a safetensors file without reading its tensors; raise a ValueError if the file is missing or damaged."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with _utf8_link(Path(path)) as readable, safe_open(readable, framework="pt") as opened:
            yield WeightsFile(opened)
    except (SafetensorError, OSError, KeyError) as error:
        _check_no_pointer(Path(path))
        raise ValueError(f"{path} is not a readable safetensors file: {one_line(error)}") from error


def _check_no_pointer(path: Path) -> None:
    """Raise a ValueError if a file is what Git LFS leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} {POINTER_REASON}")


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a new hidden folder in `folder`, which is removed at the end, as are those that killed processes left.

    While a process has such a folder, it shares a lock of `folder`. Who has the lock alone removes what is left over.
    """
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)  # also the target of a link
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is a file, or is in a file; pass a folder") from error
    with _shared_lock(folder), tempfile.TemporaryDirectory(dir=folder, prefix=_STAGE_PREFIX) as name:
        yield Path(name)


@contextmanager
def _shared_lock(folder: Path) -> Iterator[None]:
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has no such locks
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
        with suppress(OSError):  # another process is writing
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in folder.glob(f"{_STAGE_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def _utf8_link(path: Path) -> Iterator[Path]:
    """Yield a path that safetensors can open: `path`, or a temporary link to it if its name is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; after a `with` block without errors, sync its files and move the files to `folder`."""
    with temporary_folder(folder) as stage:
        try:
            yield stage
        except OSError as error:
            if error.filename is None and error.strerror:  # such as "No space left on device", without a file
                raise OSError(error.errno, f"cannot write to {folder}: {error.strerror}") from error
            raise
        files = sorted(stage.iterdir())
        # A new file has the default permissions; safetensors writes files that only their owner can read.
        sample = stage / ".mode"
        sample.touch()
        mode = stat.S_IMODE(sample.stat().st_mode)
        for file in files:
            file.chmod(mode)
            sync_to_disk(file)
        for file in files:
            os.replace(file, folder / file.name)
        sync_to_disk(folder)


@typed
def sync_to_disk(path: str | Path) -> None:
    """Wait until the content of a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
