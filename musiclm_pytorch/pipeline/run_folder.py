"""Functions for the output folder of a training run: check of the settings, lock, removal of partial files."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.saving.files import differences, read_json, write_json

__all__ = ["check_run_folder", "hash_of", "lock_folder", "read_record", "remove_partial_files"]

_FORMAT_VERSION = 1
_RUN_FILE = "run.json"
_MAX_SHOWN = 3


@beartype
def check_run_folder(folder: Path, facts: Mapping[str, Any], write: bool = True) -> None:
    """Write the settings `facts` to a new folder, or check that a used folder contains a run with equal settings."""
    facts = json.loads(json.dumps({"format_version": _FORMAT_VERSION, **facts}))
    file = folder / _RUN_FILE
    if not file.is_file():
        if write:
            write_json(file, facts, sealed=True)
        return
    lines = differences(read_record(file), facts)
    if lines:
        more = f"; and {len(lines) - _MAX_SHOWN} more" if len(lines) > _MAX_SHOWN else ""
        raise ValueError(
            f"{folder} contains a run with other settings ({'; '.join(lines[:_MAX_SHOWN])}{more}); "
            "use the same settings or another --out"
        )


@beartype
def read_record(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a training run, or raise a ValueError if the file contains anything else."""
    record = read_json(file)
    if not isinstance(record, dict):
        raise ValueError(f"{file} must contain a JSON object, got {type(record).__name__}; use another --out")
    return record


@beartype
def hash_of(content: bytes) -> str:
    """Compute a hash of bytes as 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a training run, and create a missing folder. A lock is released when its process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another musiclm train; wait until it ends, or use another --out"
            ) from error
        yield


@beartype
def remove_partial_files(folder: Path) -> None:
    """Remove the partial files of a killed process from a folder that this process has locked."""
    for pattern in (".writing-*", ".chunk-*.partial"):
        for path in list(folder.rglob(pattern)):
            shutil.rmtree(path, ignore_errors=True)
