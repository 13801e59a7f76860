"""File with the settings of a pipeline run, and hashes of the results of its steps."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import write_json
from audiolm_pytorch.training.run_folder import changed_settings, read_record

__all__ = ["RUN_FILE", "RUN_MARKS", "check_run_folder", "hash_of"]

_FORMAT_VERSION = 1
RUN_FILE = "run.json"
RUN_MARKS = {RUN_FILE: ("format_version", "preset")}


@typed
def check_run_folder(
    folder: Path, facts: Mapping[str, Any], write: bool = True, allow_changed: Sequence[str] = ()
) -> None:
    """Write the settings `facts` to a new folder, or check that a used folder contains a run with equal settings.

    Differences in the settings named in `allow_changed` are logged and written to the folder.
    """
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
