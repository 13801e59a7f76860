"""Checkpoints as safetensors and JSON files; replacing a checkpoint can be interrupted at any instant without loss."""

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
    """State of a training run in a checkpoint; a run continues from it.

    Attributes:
        step: Number of completed steps.
        tensors: Named tensors of each file, by file name without suffix ("model", "optimizer", "ema").
        state: All other state, JSON-able.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class CheckpointFolder:
    """Folder of the checkpoint of a training run.

    A new checkpoint is written to a second folder, `state.json` last; a checkpoint with a `state.json` is complete.
    Then two renames exchange the folders. If the process dies at any instant, a complete checkpoint is left and
    `recover` finds it. The names `checkpoint`, `checkpoint.new` and `checkpoint.old` in the folder are reserved.
    """

    @beartype
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.path = self._folder / "checkpoint"
        self._new = self._folder / "checkpoint.new"
        self._old = self._folder / "checkpoint.old"

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint that replaces the present one; its tensors may belong to a model in training."""
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
        """On one process only, finish or undo an interrupted `write`; return whether there is a checkpoint."""
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
        """Read the checkpoint; its tensors are on the CPU.

        Raises:
            ValueError: If a file is missing, is damaged, or has another format or step; the message names the file.
        """
        path = self.path / _STATE_FILE
        state = read_json(path)
        if state.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {state.get('format_version')!r}, this program reads {_FORMAT_VERSION}; "
                "continue with the release that wrote it, or start in another folder"
            )
        tensors = {}
        for name in state["files"]:
            tensors[name], metadata = read_weights(self.path / f"{name}.safetensors")
            if metadata.get("step") != str(state["step"]):
                raise ValueError(
                    f"{self.path / name}.safetensors is of step {metadata.get('step')}, but {_STATE_FILE} of step "
                    f"{state['step']}; another program changed the folder"
                )
        return Checkpoint(state["step"], tensors, state["state"])


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
