"""Options that several commands have, and checks of command-line arguments."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiolm_pytorch.saving.text import printable

if TYPE_CHECKING:
    import torch

__all__ = [
    "ModelOptions",
    "OneLineFormatter",
    "check_apart",
    "check_at_least",
    "check_file",
    "check_folder",
    "check_needs",
    "check_seconds",
    "check_words",
    "device_named",
    "printable_line",
]

_MAX_SECONDS = 3600
_MAX_NUMBER = 2**32  # limit of the seeds of scikit-learn


def printable_line(text: str) -> str:
    """Return a text as one line in which control characters, such as ESC in a file name, are escaped."""
    return printable(" ".join(text.split()))


def check_words(words: Sequence[str]) -> None:
    """Raise a ValueError if a word of the command line is empty, since an empty path would be the current folder.

    The text of `generate` is checked by this command.
    """
    for before, word in zip(["", *words], words):
        option, is_pair, value = word.partition("=")
        if before != "generate" and not (value if is_pair and option.startswith("--") else word):
            place = f"of {option}" if option else f"after {before or 'musiclm'}"
            advice = "perhaps from an unset variable; pass a value, or . for the current folder"
            raise ValueError(f"the value {place} is empty, {advice}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of commands that load models."""

    offline: bool = False
    """Do not use the network. A hub id is then looked up in the local cache only."""
    allow_noncommercial: bool = False
    """Also load weights whose licence forbids commercial use."""

    def source_of(self, name: str) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for a name; a hub id may end in a revision, owner/name@revision."""
        source, separator, revision = name.rpartition("@")
        if not separator or Path(name).expanduser().exists():
            source, revision = name, ""
        hub = {"offline": self.offline, "allow_noncommercial": self.allow_noncommercial}
        return {"source": source, "revision": revision or None, **hub}


class OneLineFormatter(logging.Formatter):
    """Formatter of log messages that calls `printable_line`, so that a file name cannot imitate another message."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line; a traceback keeps its lines."""
        return (
            f"{record.levelname} {printable_line(record.getMessage())}"
            if not record.exc_info
            else super().format(record)
        )


def log_to_standard_error() -> None:
    """Print warnings of the program, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def device_named(name: str) -> "torch.device":
    """Return the device with this name; "auto" selects the GPU if there is one, else the CPU.

    A ValueError is raised if a kernel of the device is silently wrong, as some of MPS were.
    """
    import torch

    from audiolm_pytorch.checks.kernels import check_kernels
    from audiolm_pytorch.checks.types import usable_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(name)
    wrong = [] if device.type == "cpu" else [check.name for check in check_kernels(device) if not check.is_right]
    if wrong:
        raise ValueError(
            f"the device {device} computes wrong results ({', '.join(wrong)}); use --device cpu, and see "
            f"musiclm doctor --device {device}"
        )
    return device


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


def check_data(path: Path) -> None:
    """Check that the folder or manifest of --data exists."""
    if not path.exists():
        raise ValueError(f"{path}: no such folder or manifest; give a folder of audio files as --data")


def check_apart(output: Path, inputs: Sequence[Path | None]) -> None:
    """Check that no input (None = not given) is the file or folder `output`, or in this folder."""
    for path in inputs:
        if path is not None and output.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{path} is read, and would be overwritten by {output}; name another --out")


def check_at_least(command: object, **minima: int) -> None:
    """Check that options with these names (None = not given) have at least these values, and less than 2**32."""
    for name, minimum in minima.items():
        value = getattr(command, name)
        if value is not None and not minimum <= value < _MAX_NUMBER:
            bound = f"at least {minimum}" if value < minimum else f"below {_MAX_NUMBER}"
            raise ValueError(f"{option_name(name)} must be {bound}, got {value}")


def check_needs(command: object, needs: Mapping[str, str]) -> None:
    """Check that each of these options, if it is given, has the option with which alone it is used."""
    for name, needed in needs.items():
        if getattr(command, name) not in (None, False, ()) and getattr(command, needed) in (None, False, ()):
            option = option_name(name)
            raise ValueError(f"{option} needs {option_name(needed)}; add it, or leave out {option}")


def check_seconds(seconds: float | None) -> None:
    """Check the value of --seconds (None = not given)."""
    if seconds is not None and not 0 < seconds <= _MAX_SECONDS:
        raise ValueError(f"--seconds must be above 0 and at most {_MAX_SECONDS}, got {seconds:g}")


def option_name(name: str) -> str:
    """Return the option of an attribute of a command."""
    return f"--{name.replace('_', '-')}"
