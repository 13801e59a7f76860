"""Output folder of a training run: checks that the folder may be used, locks it, and compares the settings of runs."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any

from audiolm_pytorch.saving.files import differences, read_json
from audiolm_pytorch.saving.text import logger_named

__all__ = ["changed_settings", "check_own_folder", "claimed_folder", "read_record"]

_LOCK_FILE = ".lock"
# Names of files and folders that a process leaves behind if it is killed in the middle of a write.
_PARTIAL_NAME = re.compile(r"\.writing-\w+|\..+\.\d+\.partial(\.\w+)?")
# A JSON file or a safetensors file of a run has one of these texts in its first bytes.
_OWN_BEGINNINGS, _NUM_BEGIN_BYTES = (b'"format_version"', b'"__metadata__":{"step":'), 2**10
_MAX_SHOWN = 3

logger = logger_named(__name__)


@contextmanager
def claimed_folder(folder: Path, markers: Sequence[str]) -> Iterator[None]:
    """Lock an output folder for this process, create it if it is missing, and remove partial files of killed processes.

    `markers` are names of files and folders that only a run of the same kind writes; see `check_own_folder`. If another
    process or another trainer of this process has locked the folder, a ValueError is raised.
    """
    check_own_folder(folder, markers)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _remove_partial_files(folder)
        yield


def check_own_folder(folder: Path, markers: Sequence[str]) -> None:
    """Raise a ValueError if a folder has files, but none of the `markers` of an earlier run.

    A marker counts only if a run has written it, since files of the user can have the same name.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; pass a folder for the results")
    if not folder.exists():
        return
    own = [marker for marker in markers if (folder / marker).exists() and _is_own(folder / marker)]
    if any((folder / marker).is_file() or any((folder / marker).iterdir()) for marker in own):
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own and not _is_own_name(path.name))
    if foreign:
        more = f" and {len(foreign) - _MAX_SHOWN} more" if len(foreign) > _MAX_SHOWN else ""
        raise ValueError(
            f"{folder} contains files that do not belong to a run of this kind ({', '.join(foreign[:_MAX_SHOWN])}"
            f"{more}); pass a new or empty folder, or the folder of the run to continue"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The system releases a lock when its process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / _LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another training; wait until it ends, or use another folder"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s); start only one training in this folder", folder, error)
        yield


def _is_own(path: Path) -> bool:
    """Return whether a run has written a file, or all files in a folder."""
    if path.is_dir():
        return all(_is_own_name(entry.name) or _is_own(entry) for entry in path.iterdir())
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begin = file.read(_NUM_BEGIN_BYTES)
    return any(text in begin for text in _OWN_BEGINNINGS)


def _is_own_name(name: str) -> bool:
    return name == _LOCK_FILE or _is_partial(name)


def _is_partial(name: str) -> bool:
    return _PARTIAL_NAME.fullmatch(name) is not None


def _remove_partial_files(folder: Path) -> None:
    """Remove partial files below a locked folder, except in folders below it that contain a lock."""
    for place, folders, names in os.walk(folder):
        for name in [name for name in folders if _is_partial(name)]:
            shutil.rmtree(Path(place, name), ignore_errors=True)
        folders[:] = [name for name in folders if not _is_partial(name) and not Path(place, name, _LOCK_FILE).exists()]
        for name in names:
            if _is_partial(name):
                with suppress(OSError):
                    Path(place, name).unlink()


def read_record(file: Path, **types: type | UnionType) -> dict[str, Any]:
    """Read a JSON object from a file of a run; raise a ValueError if an entry is missing or not of its type."""
    record = read_json(file)
    if not isinstance(record, dict):
        raise ValueError(f"{file} must contain a JSON object, got {type(record).__name__}; use another folder")
    if wrong := [name for name, kind in types.items() if not isinstance(record.get(name), kind)]:
        raise ValueError(f"{file} has no usable entries {wrong}; restore the file, or use another folder")
    return record


def changed_settings(
    folder: Path, found: Any, expected: Mapping[str, Any], allowed: Sequence[str], about: str = ""
) -> list[str]:
    """Compare the settings of the run in a folder with the expected settings, and return the allowed differences.

    Any other difference raises a ValueError. A name in `allowed` is the last part of a setting's path, or its
    beginning: "batch_size", "settings.batch_size" and "settings" allow another "settings.batch_size".
    """
    if not isinstance(found, dict):
        raise ValueError(f"{folder} contains a run without settings{about}; use another folder")
    lines = differences(found, dict(expected))
    names = [line.partition(": ")[0] for line in lines]
    _warn_of_unknown(folder, allowed, {**found, **expected})
    is_allowed = [any(f".{one}." in f".{name}." for one in allowed) for name in names]
    refused = [line for line, allow in zip(lines, is_allowed, strict=True) if not allow]
    if refused:
        more = f"; and {len(refused) - _MAX_SHOWN} more" if len(refused) > _MAX_SHOWN else ""
        changed = [name for name, allow in zip(names, is_allowed, strict=True) if not allow]
        raise ValueError(
            f"{folder} contains a run with other settings{about}: {'; '.join(refused[:_MAX_SHOWN])}{more}. Use the "
            f"same settings or another folder, or continue with the new settings: allow_changed={changed} in Python, "
            f"--allow-changed {' '.join(changed)} on the command line"
        )
    if lines:
        logger.warning("%s continues%s with other settings: %s", folder, about, "; ".join(lines))
    return lines


def _warn_of_unknown(folder: Path, allowed: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Log the names in `allowed` that no setting of a run has, with similar names."""
    paths = _paths(settings)
    parts = {part for path in paths for part in path.split(".")}
    for name in [one for one in allowed if not any(f".{one}." in f".{path}." for path in paths)]:
        similar = get_close_matches(name, parts) or sorted(parts)
        logger.warning("allow_changed: the run in %s has no setting %r; use %s", folder, name, ", ".join(similar))


def _paths(settings: Mapping[str, Any]) -> list[str]:
    """Return the paths of all settings, such as "settings.seed"."""
    paths = []
    for name, value in settings.items():
        paths += [f"{name}.{path}" for path in _paths(value)] if isinstance(value, dict) and value else [name]
    return paths
