"""What the commands of the command line check before they work."""

from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["check_file", "device_named"]


def device_named(name: str) -> torch.device:
    """The device of that name, or for "auto" the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here; leave it out, or take cpu") from error


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a name that could not be written, before the work is done."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a file that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Refuse a folder that could not be made."""
    blocked = next((place for place in (path, *path.parents) if place.exists()), None)
    if blocked is not None and not blocked.is_dir():
        raise ValueError(f"cannot write to {path}: {blocked} is a file; name another folder")
