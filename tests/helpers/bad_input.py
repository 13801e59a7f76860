"""Tables of wrong command lines, and the check that each has one line of explanation and changes no file."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

__all__ = ["bad_input", "check_bad_input", "listing"]


def bad_input(table: str) -> Any:
    """Parametrize a test with `words` and `message`, from lines `name | words | message`.

    An indented line continues the line before it.
    """
    lines = re.sub(r"\n +", " ", table.strip()).splitlines()
    rows = [line.split(" | ") for line in lines]
    cases = [pytest.param(words.split(), message, id=name) for name, words, message in rows]
    return pytest.mark.parametrize(("words", "message"), cases)


def listing(folder: Path) -> dict[str, int]:
    """Everything below a folder, with modification times except of locks."""
    return {
        str(path.relative_to(folder)): 0 if path.name == ".lock" else path.stat().st_mtime_ns
        for path in folder.rglob("*")
    }


def check_bad_input(
    command: Callable[..., int], words: list[str], message: str, places: Mapping[str, Path], capfd: Any
) -> None:
    """Run a command. Names of `places` in the words and the message are replaced by their paths.

    The exit status must be 2, with one line on standard error that matches the message, and no change in any place.
    `''` is an empty argument.
    """

    def filled(text: str) -> str:
        for name, place in places.items():
            text = re.sub(rf"\b{name}\b", str(place), text)
        return text

    before = {place: listing(place) for place in places.values()}
    capfd.readouterr()
    assert command(*("" if word == "''" else filled(word) for word in words)) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("musiclm: ") and printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert re.search(filled(message), printed.err), printed.err
    assert {place: listing(place) for place in before} == before
