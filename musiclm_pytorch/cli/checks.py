"""Checks of command-line arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["check_file", "check_folder", "device_named"]


def device_named(name: str) -> "torch.device":
    """Return the device with this name; "auto" selects the GPU if there is one, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used on this machine; use auto or cpu") from error


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Check that the file `path` ends in one of `suffixes` and can be written."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a file that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Check that the folder `path` exists or can be created."""
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        raise ValueError(f"cannot write to {path}: {existing} is a file; name another folder")
