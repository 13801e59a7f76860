"""Texts of logs: names with line breaks or escape sequences cannot imitate other messages."""

import logging
from pathlib import Path

import pytest

from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.training.run_folder import changed_settings

ROOT = Path(__file__).parents[3]


def test_messages_of_the_library_are_one_printable_line(caplog: pytest.LogCaptureFixture) -> None:
    """Control characters of the arguments and of the text are escaped; other letters stay."""
    logger_named("audiolm_pytorch.test").warning("%s: %d\r files of Dvořák", "a\x1b[2J\nINFO all is well", 3)
    assert caplog.messages == ["a\\x1b[2J\\nINFO all is well: 3\\r files of Dvořák"]


def test_a_folder_name_cannot_imitate_a_message(caplog: pytest.LogCaptureFixture) -> None:
    """The warning about changed settings has the name of the results folder."""
    folder = Path("run\nINFO finished\x1b[2J")
    assert changed_settings(folder, {"seed": 0}, {"seed": 1}, ["seed"])
    [message] = caplog.messages
    assert message.isprintable() and message.startswith(r"run\nINFO finished\x1b[2J continues")


def test_a_pattern_without_arguments_is_no_pattern(caplog: pytest.LogCaptureFixture) -> None:
    """A per cent sign in a name is not replaced, also if a second logger of the same name is requested."""
    for _ in range(2):
        logger_named("audiolm_pytorch.test").warning("100%% of %s\n", "50%s")
        logger_named("audiolm_pytorch.test").log(logging.WARNING, "at 90%")
    assert caplog.messages == ["100% of 50%s\\n", "at 90%"] * 2


def test_warnings_come_from_the_first_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun, every process finds the same files; errors and what only one process knows are always logged."""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        logger_named("audiolm_pytorch.test").warning("left out of %s", rank)
        logger_named("audiolm_pytorch.test").error("error of %s", rank)
        logger_named("audiolm_pytorch.test_each", every_process=True).warning("batch of %s", rank)
    assert caplog.messages == ["left out of 0", "error of 0", "batch of 0", "error of 1", "batch of 1"]


def test_every_logger_of_the_library_escapes() -> None:
    """No module asks Python for a logger directly, except for those of torch."""
    files = [file for package in ("audiolm_pytorch", "musiclm_pytorch") for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    own = [file.name for file in files if "getLogger(" in file.read_text().replace('getLogger("torch.', "")]
    assert own == ["text.py"]
