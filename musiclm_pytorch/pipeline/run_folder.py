"""The folder of a run: one run, one program at a time, nothing half written."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.saving.files import differences, read_json, write_json

__all__ = ["lock_folder", "check_run_folder", "digest_of", "read_record", "remove_partial_files"]

FORMAT_VERSION = 1
_RUN_FILE = "run.json"
_MAX_SHOWN = 3


@beartype
def check_run_folder(
    folder: Path, facts: Mapping[str, Any], write: bool = True, unsaid: Mapping[str, Any] | None = None
) -> None:
    """Write down what a folder is a run of, or refuse a folder of another run.

    Args:
        folder: Of the run.
        facts: What must be the same in every session, JSON-able.
        write: Whether this process is the one that writes.
        unsaid: Facts that hold for a run which does not name them; others that a run does not name are not compared.

    Raises:
        ValueError: If the folder holds another run; the message shows the difference.
    """
    mine = json.loads(json.dumps({"format_version": FORMAT_VERSION, **facts}))
    if not (folder / _RUN_FILE).is_file():
        if write:
            write_json(folder / _RUN_FILE, mine)
        return
    unsaid = dict(unsaid or {})
    theirs, mine = {**unsaid, **read_record(folder / _RUN_FILE)}, {**unsaid, **mine}
    lines = differences(theirs, _known_to(theirs, mine))
    if lines:
        more = f"; and {len(lines) - _MAX_SHOWN} more" if len(lines) > _MAX_SHOWN else ""
        raise ValueError(
            f"{folder} holds another run ({'; '.join(lines[:_MAX_SHOWN])}{more}); "
            "use the same settings or another --out"
        )


def _known_to(theirs: Any, mine: Any) -> Any:
    """Leave out what the release that began the run did not know: a number added since is as it always was."""
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return mine
    return {key: _known_to(theirs[key], value) for key, value in mine.items() if key in theirs}


@beartype
def read_record(file: Path) -> dict[str, Any]:
    """Read what a run wrote down about itself: a JSON object, or a ValueError that names the file."""
    record = read_json(file)
    if not isinstance(record, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(record).__name__}; mend it or use another --out")
    return record


@beartype
def digest_of(content: bytes) -> str:
    """Hash of some content, 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second program out of a run's folder; the lock ends with the process, however that ends.

    Args:
        folder: Of the run; made if missing.

    Yields:
        Nothing, while the folder is ours.

    Raises:
        ValueError: If another program is at work in it.
    """
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
                f"{folder} is in use by another musiclm train; wait for it or use another --out"
            ) from error
        yield


@beartype
def remove_partial_files(folder: Path) -> None:
    """Remove what a killed session left half written below a folder that nobody else writes to."""
    for pattern in (".writing-*", ".chunk-*.partial"):
        for leftover in list(folder.rglob(pattern)):
            shutil.rmtree(leftover, ignore_errors=True)
