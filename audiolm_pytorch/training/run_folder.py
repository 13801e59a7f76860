"""Output folder of a training run: checks that the folder may be used, locks it, and compares the settings of runs."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import IO, Any

from audiolm_pytorch.saving.files import differences, read_json
from audiolm_pytorch.saving.ownership import LOCK_FILE, check_folder_owner, is_leftover
from audiolm_pytorch.saving.text import logger_named

__all__ = ["RUN_KIND", "changed_settings", "claimed_folder", "read_record"]

RUN_KIND = "a run of this kind"

_MAX_SHOWN = 3

logger = logger_named(__name__)

_LOCKS: set[IO[str]] = set()  # open files whose locks this process holds


def _close_locks() -> None:
    while _LOCKS:
        _LOCKS.pop().close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def claimed_folder(folder: Path, markers: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Lock an output folder for this process, create it if it is missing, and remove partial files of killed processes.

    `markers` are files and folders of a run of this kind (see `check_folder_owner`). If another process or another
    trainer of this process has locked the folder, a ValueError is raised.
    """
    check_folder_owner(folder, markers, RUN_KIND)
    folder.resolve().mkdir(parents=True, exist_ok=True)  # also the target of a link
    with _locked(folder):
        _remove_partial_files(folder)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The system releases a lock when its process ends; forked workers do not keep it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another training; wait until it ends, or use another folder"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s); start only one training in this folder", folder, error)
        _LOCKS.add(file)
        try:
            yield
        finally:
            _LOCKS.discard(file)


def _remove_partial_files(folder: Path) -> None:
    """Remove partial files below a locked folder, except in folders below it that contain a lock."""
    for place, folders, names in os.walk(folder):
        for name in [name for name in folders if is_leftover(name)]:
            shutil.rmtree(Path(place, name), ignore_errors=True)
        folders[:] = [name for name in folders if not is_leftover(name) and not Path(place, name, LOCK_FILE).exists()]
        for name in names:
            if is_leftover(name) and name != LOCK_FILE:
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
    folder: Path, found: Any, expected: Mapping[str, Any], allowed: Sequence[str], about: str = "", log: bool = True
) -> list[str]:
    """Compare the settings of the run in a folder with the expected settings, and return and log allowed differences.

    Any other difference raises a ValueError. A name in `allowed` is the last part of a setting's path, or its
    beginning: "batch_size", "settings.batch_size" and "settings" allow another "settings.batch_size".
    """
    if not isinstance(found, dict):
        raise ValueError(f"{folder} contains a run without settings{about}; use another folder")
    lines = differences(found, dict(expected))
    names = [line.partition(": ")[0] for line in lines]
    if log:
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
    if lines and log:
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
