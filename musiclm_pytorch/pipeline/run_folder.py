"""Folder of a pipeline run: its lock, the file with its settings, and hashes of the results of its steps."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.items import items_digest
from audiolm_pytorch.saving.files import write_json
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.training.run_folder import changed_settings, claimed_folder, read_record
from musiclm_pytorch.pipeline.pretrained_parts import PRETRAINED_KINDS

if TYPE_CHECKING:
    import accelerate

    from musiclm_pytorch.pipeline.pipeline import Pipeline

__all__ = ["RUN_FILE", "RUN_MARKS", "claimed_run", "facts_of", "hash_of"]

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


def facts_of(pipeline: "Pipeline") -> dict[str, Any]:
    """Return the settings that must not change when the run of a pipeline continues."""
    # relative paths: the corpus may be moved
    root = (pipeline.data.parent if pipeline.data.is_file() else pipeline.data).resolve()
    items = [*pipeline.train_items, *pipeline.valid_items]
    paths = sorted(os.path.relpath(item.path.resolve(), root) for item in items)
    preset = asdict(pipeline.preset)
    del preset["melody"]  # checked by the trainers, so that finished runs without melodies can be trained on
    return {
        **pipeline.start.facts,
        "preset": preset,
        "seed": pipeline.seed,
        "num_files": len(paths),
        "files": hash_of(os.fsencode("\n".join(paths))),
        "data": items_digest(items),
        "captions": hash_of("\n".join(pipeline.captions).encode()),
        "pretrained": {
            step: part_fingerprint(pipeline.pretrained[step]) if step in pipeline.pretrained else "none"
            for step in PRETRAINED_KINDS
        },
    }
