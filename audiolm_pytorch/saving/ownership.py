"""Whether this library wrote the files of a path or a folder, so that it may replace them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import open_weights

__all__ = ["LOCK_FILE", "check_folder_owner", "check_overwrite", "check_same_class", "is_leftover", "is_own"]

LOCK_FILE = ".lock"
# Names of files and folders that a process leaves behind if it is killed in the middle of a write.
_LEFTOVER_NAME = re.compile(r"\.writing-\w+|\..+\.\d+\.partial(\.\w+)?")
_MAX_JSON_BYTES, _NUM_BEGIN_BYTES = 2**26, 2**16
_MAX_SHOWN = 3


@typed
def is_own(path: Path, marks: Sequence[str]) -> bool:
    """Return whether this library wrote a file, which then has all `marks`.

    Marks are keys of the object in a JSON file (for JSON lines of the first line), keys in the header of a safetensors
    file, or texts in the first bytes of another file. A seal is not checked, and may have been removed.
    """
    try:
        if path.suffix == ".safetensors":
            with open_weights(path) as weights:
                return weights.metadata.keys() >= {*marks}
        with path.open("rb") as file:
            if path.suffix not in (".json", ".jsonl"):
                begin = file.read(_NUM_BEGIN_BYTES)
                return all(mark.encode() in begin for mark in marks)
            content = json.loads(file.readline() if path.suffix == ".jsonl" else file.read(_MAX_JSON_BYTES))
            return isinstance(content, dict) and content.keys() >= {*marks}
    except (OSError, ValueError, RecursionError):
        return False


@typed
def check_overwrite(main: Path, marks: Sequence[str], others: Iterable[Path] = ()) -> None:
    """Raise a ValueError if the file `main`, or a file of `others`, exists and may not be replaced.

    A file `main` with the `marks` of `is_own` may be replaced, and so may the `others`, which are written after it.
    """
    if main.exists():
        taken = [] if is_own(main, marks) else [main]
    else:
        taken = [path for path in others if path.exists()]
    if taken:
        raise ValueError(
            f"{taken[0]} exists, and was not written by this library; move it away, or write to another place"
        )


@typed
def check_same_class(config: Path, name: str) -> None:
    """Raise a ValueError if a config of a saved module exists, and is of another class than `name`."""
    found = json.loads(config.read_bytes()).get("class") if config.exists() else name
    if found != name:
        raise ValueError(
            f"{config.parent} contains a saved {found}, which a {name} would replace; move it away, or save to another "
            "folder"
        )


@typed
def check_folder_owner(folder: Path, markers: Mapping[str, Sequence[str]], kind: str) -> None:
    """Raise a ValueError unless a folder is new or empty, or was written by this library as a folder of this kind.

    Args:
        markers: Files, and folders of files, that only a folder of this kind has, with their marks (see `is_own`). One
            complete marker is enough. The name alone is not, since files of the user can have the same name.
        kind: Description for messages, such as "a run".
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; pass a folder")
    if not folder.exists():
        return
    foreign = []
    for name, marks in markers.items():
        files = _files(folder / name)
        strange = [file for file in files if not is_own(file, marks)]
        if files and not strange:
            return
        foreign += strange
    if foreign:
        raise ValueError(
            f"{foreign[0]} is damaged or does not belong to {kind}; restore the file, or pass a new or empty folder"
        )
    names = sorted(path.name for path in folder.iterdir() if path.name not in markers and not is_leftover(path.name))
    if names:
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        raise ValueError(
            f"{folder} contains files that do not belong to {kind} ({', '.join(names[:_MAX_SHOWN])}{more}); pass a new "
            f"or empty folder, or the folder of {kind}"
        )


def is_leftover(name: str) -> bool:
    """Return whether a file or folder has the name of a lock, or of what a killed process leaves behind."""
    return name == LOCK_FILE or _LEFTOVER_NAME.fullmatch(name) is not None


def _files(place: Path) -> list[Path]:
    """List a file, or the files below a folder; leftovers are skipped."""
    if is_leftover(place.name):
        return []
    if place.is_dir():
        return [file for entry in sorted(place.iterdir()) for file in _files(entry)]
    return [place] if place.exists() else []
