"""Checkpoints that survive an interruption at any instant: two generations of safetensors and JSON, and renaming."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beartype import beartype
from torch import Tensor

from audiolm_pytorch.saving.files import read_json, read_weights, sync_to_disk, write_json, write_weights

__all__ = ["Checkpoint", "CheckpointFolder", "differences"]

_FORMAT_VERSION = 1
_STATE_FILE = "state.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a run needs to go on.

    Args:
        step: Number of steps done.
        tensors: File name without suffix ("model", "optimizer", "ema") to its named tensors.
        state: Everything else, JSON-able.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoint of one run.

    A new generation is written beside the present one, its `state.json` last, so that a `state.json` means a whole
    generation. Then two renames swap them. Whatever instant a process dies at, one whole generation is left and
    `recover` finds it.

    Args:
        folder: Of the run. Nothing is touched before `write` or `recover`; the names `checkpoint`, `checkpoint.new` and
            `checkpoint.old` in it are this class's own.
    """

    @beartype
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.path = self._folder / "checkpoint"
        self._new = self._folder / "checkpoint.new"
        self._old = self._folder / "checkpoint.old"

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a generation and let it take the place of the present one.

        Args:
            checkpoint: What to keep. Its tensors may be those of a running training; they are read before this returns.
        """
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
        """Finish or undo an interrupted `write`; one process at a time.

        Returns:
            Whether there is a checkpoint.
        """
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
        """Read the present generation.

        Returns:
            The checkpoint, its tensors on the CPU.

        Raises:
            ValueError: A file is missing, damaged, of another format or of another step; the message names it.
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
                    f"{state['step']}; the folder was altered from outside"
                )
        return Checkpoint(state["step"], tensors, state["state"])


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List where two nested settings differ, one readable line each.

    Args:
        there: Settings of the checkpoint.
        here: Settings of now.
        prefix: Path of names so far.

    Returns:
        Lines such as `seed: 0 there, 1 here`.
    """
    lines = []
    for name in sorted(set(there) | set(here)):
        old, new = there.get(name, "nothing"), here.get(name, "nothing")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old} there, {new} here")
    return lines


def _remove(folder: Path) -> None:
    """Remove a generation that this module wrote."""
    if folder.exists():
        shutil.rmtree(folder)
