"""Folder of a pipeline run: its lock, the file with its settings, and hashes of the results of its steps."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import write_json
from audiolm_pytorch.training.run_folder import changed_settings, claimed_folder, read_record

if TYPE_CHECKING:
    import accelerate

__all__ = ["RUN_FILE", "RUN_MARKS", "claimed_run", "hash_of"]

_FORMAT_VERSION = 1
RUN_FILE = "run.json"
RUN_MARKS = {RUN_FILE: ("format_version", "preset")}


@contextmanager
def claimed_run(
    folder: Path, facts: Mapping[str, Any], accelerator: "accelerate.Accelerator", allow_changed: Sequence[str] = ()
) -> Iterator[None]:
    """Lock the folder of a run, whose settings must be equal if it is used.

    The main process locks the folder and writes the settings `facts` to a new folder. Differences in the settings named
    in `allow_changed` are logged and written.
    """
    is_main = accelerator.is_main_process
    with claimed_folder(folder, RUN_MARKS) if is_main else nullcontext():
        accelerator.wait_for_everyone()  # before another process writes files that would be removed
        _check_settings(folder, facts, is_main, allow_changed)
        yield


def _check_settings(folder: Path, facts: Mapping[str, Any], write: bool, allow_changed: Sequence[str]) -> None:
    facts = json.loads(json.dumps({"format_version": _FORMAT_VERSION, **facts}))
    file = folder / RUN_FILE
    is_new = not file.is_file()
    if is_new or changed_settings(folder, read_record(file), facts, allow_changed):
        if write:
            write_json(file, facts, sealed=True)


@typed
def hash_of(content: bytes) -> str:
    """Compute a hash of bytes as 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]
