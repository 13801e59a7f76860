"""Checkpoints in safetensors and JSON files: two generations, checked by digests, complete after any interruption."""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import read_versioned, read_weights, sync_to_disk, write_json, write_weights
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.training.sharding import is_sharded, local_part

__all__ = ["Checkpoint", "CheckpointFolder"]

_FORMAT_VERSION = 3
_STATE_FILE = "state.json"
_BLOCK_BYTES = 2**16

logger = logger_named(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Saved state from which a training run can continue.

    Attributes:
        tensors: Dict of named tensors for each file name without suffix (`model`, `optimizer`, `ema`).
        state: JSON-compatible state of the run, without tensors.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class CheckpointFolder:
    """Folder with the latest checkpoint of a training run (`checkpoint/`) and the one before (`checkpoint.previous/`).

    A new checkpoint is written to a second folder; `state.json` is written last, contains a digest of every file, and
    marks the checkpoint as complete. Renames then replace the generations. If the process dies at any time, `recover`
    finds a complete checkpoint. The names `checkpoint` and `checkpoint.*` in the folder are reserved.
    """

    @typed
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.path = self._folder / "checkpoint"
        self.previous = self._folder / "checkpoint.previous"
        self._new = self._folder / "checkpoint.new"
        self._old = self._folder / "checkpoint.old"

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and keep the one before; the tensors can be the parameters of a model."""
        self.recover()
        files = self._write_tensors(checkpoint, checkpoint.tensors, ".safetensors")
        self._complete(checkpoint, files)

    def write_shards(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint of sharded tensors; every process calls this method, and writes its parts to own files.

        Tensors that are not sharded, and the state, are those of the first process.
        """
        rank, num_processes = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            self.recover()
        dist.barrier()
        own = {
            name: {key: local_part(tensor) for key, tensor in tensors.items() if rank == 0 or is_sharded(tensor)}
            for name, tensors in checkpoint.tensors.items()
        }
        files: list[Any] = [None] * num_processes
        suffix = f".{rank:05d}-of-{num_processes:05d}.safetensors"
        dist.all_gather_object(files, self._write_tensors(checkpoint, own, suffix))
        if rank == 0:
            self._complete(checkpoint, {name: digest for part in files for name, digest in part.items()})

    def _write_tensors(
        self, checkpoint: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]], suffix: str
    ) -> dict[str, str]:
        """Write files of a new checkpoint, and return their digests by name."""
        files = {}
        for name, tensors in sorted(parts.items()):
            file = self._new / f"{name}{suffix}"
            write_weights(file, tensors, {"step": str(checkpoint.step)})
            files[file.name] = _digest(file)
        return files

    def _complete(self, checkpoint: Checkpoint, files: dict[str, str]) -> None:
        """Write the file that marks the new checkpoint as complete, and replace the generations."""
        state = {"format_version": _FORMAT_VERSION, "step": checkpoint.step, "files": files, "state": checkpoint.state}
        write_json(self._new / _STATE_FILE, state, sealed=True)
        if self.path.exists():
            if self.previous.exists():
                os.replace(self.previous, self._old)
            os.replace(self.path, self.previous)
        os.replace(self._new, self.path)
        sync_to_disk(self._folder)
        _remove(self._old)

    def recover(self) -> bool:
        """Finish or undo an interrupted `write`, on one process only; return whether a checkpoint exists."""
        if not self.path.exists() and (self._new / _STATE_FILE).is_file():
            os.replace(self._new, self.path)
        if not self.previous.exists() and self._old.exists():
            os.replace(self._old, self.previous)
        _remove(self._old)
        _remove(self._new)
        return self.path.exists() or self.previous.exists()

    def remove_previous(self) -> None:
        """Remove all checkpoints except for the latest."""
        _remove(self.previous)

    def recovered(self) -> Checkpoint | None:
        """Call `recover`, and read the latest undamaged checkpoint; return None if there is no checkpoint.

        A damaged checkpoint is removed if the one before can be read. Only one process may call this method.
        """
        if not self.recover():
            return None
        try:
            return self.read()
        except (ValueError, OSError) as error:
            if not self.previous.exists():
                raise
            reason, step = str(error), _step_of(self.path)
        try:
            checkpoint = self._read(self.previous)
        except (ValueError, OSError) as error:
            raise ValueError(f"{reason}; the checkpoint before is damaged too: {error}") from error
        logger.warning(
            "the checkpoint of step %s cannot be used (%s); training continues from the checkpoint before, of step %d",
            *(step, reason, checkpoint.step),
        )
        _remove(self.path)
        os.replace(self.previous, self.path)
        return checkpoint

    def read(self) -> Checkpoint:
        """Read the latest checkpoint, with all tensors on the CPU."""
        return self._read(self.path)

    def _read(self, folder: Path) -> Checkpoint:
        path = folder / _STATE_FILE
        content = read_versioned(path, _FORMAT_VERSION)
        step, files, state = (content.get(name) for name in ("step", "files", "state"))
        if not (isinstance(step, int) and isinstance(files, dict) and isinstance(state, dict)):
            raise ValueError(f"{path} lacks step, files or state; restore the file")
        parts: dict[str, list[dict[str, Tensor]]] = {}
        for name, digest in sorted(files.items()):
            file = folder / Path(name).name
            if not file.is_file():
                raise ValueError(f"there is no file {file}")
            if _digest(file) != digest:
                raise ValueError(f"{file} has changed since it was written, its digest differs; restore the file")
            tensors, metadata = read_weights(file)
            parts.setdefault(file.name.partition(".")[0], []).append(tensors)
            if metadata.get("step") != str(step):
                raise ValueError(
                    f"{file} is from step {metadata.get('step')}, but {_STATE_FILE} is from step {step}; restore both "
                    "files from one checkpoint"
                )
        return Checkpoint(step, {name: _joined(part) for name, part in parts.items()}, state)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the parts that processes have written of sharded tensors; the first process has written all others."""
    found = {name: [part[name] for part in parts if name in part] for name in parts[0]}
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in found.items()}


def _digest(path: Path) -> str:
    """Hash the sums of the blocks of a file into 64 hexadecimal digits; a changed 8-byte word always changes a sum.

    The SHA-256 of all bytes would need more processor time than the write of the file.
    """
    if not path.stat().st_size:
        return ""
    content = np.memmap(path, mode="r")
    end = len(content) // _BLOCK_BYTES * _BLOCK_BYTES
    sums = content[:end].view(np.uint64).reshape(-1, _BLOCK_BYTES // 8).sum(1)
    return hashlib.sha256(sums.tobytes() + content[end:].tobytes()).hexdigest()


def _step_of(folder: Path) -> str:
    """Return the step of a damaged checkpoint as text, or "unknown"."""
    for file in sorted(folder.glob("*"), key=lambda file: file.name != _STATE_FILE):
        with file.open("rb") as opened:
            found = re.search(rb'"step": ?"?(\d+)', opened.read(2**16))
        if found:
            return found[1].decode()
    return "unknown"


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
