"""Checkpoints in safetensors and JSON files; if writing is interrupted, a complete checkpoint remains."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beartype import beartype
from torch import Tensor

from audiolm_pytorch.saving.files import read_json, read_weights, sync_to_disk, write_json, write_weights

__all__ = ["Checkpoint", "CheckpointFolder"]

_FORMAT_VERSION = 1
_STATE_FILE = "state.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Saved state from which a training run can continue.

    Attributes:
        step: Number of completed steps.
        tensors: Dict of named tensors for each file name without suffix (`model`, `optimizer`, `ema`).
        state: JSON-compatible state of the run, without tensors.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class CheckpointFolder:
    """Folder with the latest checkpoint of a training run; a new checkpoint replaces the old checkpoint.

    A new checkpoint is written to a second folder; `state.json` is written last, and marks the checkpoint as complete.
    Two renames then replace the old checkpoint by the new checkpoint. If the process dies at any time, `recover` finds
    a complete checkpoint. The names `checkpoint`, `checkpoint.new` and `checkpoint.old` in the folder are reserved.
    """

    @beartype
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.path = self._folder / "checkpoint"
        self._new = self._folder / "checkpoint.new"
        self._old = self._folder / "checkpoint.old"

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, which replaces the existing one; the tensors can be the parameters of a model."""
        self.recover()
        for name, tensors in checkpoint.tensors.items():
            write_weights(self._new / f"{name}.safetensors", tensors, {"step": str(checkpoint.step)})
        state = {"format_version": _FORMAT_VERSION, "step": checkpoint.step, "files": sorted(checkpoint.tensors)}
        write_json(self._new / _STATE_FILE, state | {"state": checkpoint.state})
        if self.path.exists():
            os.replace(self.path, self._old)
        os.replace(self._new, self.path)
        sync_to_disk(self._folder)
        _remove(self._old)

    def recover(self) -> bool:
        """Finish or undo an interrupted `write`, on one process only; return whether a checkpoint exists."""
        if not self.path.exists():
            if (self._new / _STATE_FILE).is_file():
                os.replace(self._new, self.path)
            elif self._old.exists():
                os.replace(self._old, self.path)
        if self.path.exists():
            _remove(self._old)
        _remove(self._new)
        return self.path.exists()

    def read(self) -> Checkpoint:
        """Read the checkpoint, with all tensors on the CPU.

        Raises:
            ValueError: If a file of the checkpoint is missing or damaged, or has another format version or step.
        """
        path = self.path / _STATE_FILE
        state = read_json(path)
        if state.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {state.get('format_version')!r}, this release reads {_FORMAT_VERSION}; "
                "continue with the release that wrote the checkpoint, or start in another folder"
            )
        tensors = {}
        for name in state["files"]:
            tensors[name], metadata = read_weights(self.path / f"{name}.safetensors")
            if metadata.get("step") != str(state["step"]):
                raise ValueError(
                    f"{self.path / name}.safetensors is from step {metadata.get('step')}, but {_STATE_FILE} is from "
                    f"step {state['step']}; restore both files from one checkpoint"
                )
        return Checkpoint(state["step"], tensors, state["state"])


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
