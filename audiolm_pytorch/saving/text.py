"""Texts of error messages and logs in one line of printable letters; this module does not import torch."""

import logging
import os

__all__ = ["joined_lines", "logger_named", "one_line", "printable"]


def joined_lines(text: object) -> str:
    """Return a text in one line, in which single spaces replace white space and control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)[:2000]).split())


def one_line(error: BaseException, max_letters: int = 300) -> str:
    """Return type and message of an error as one line of printable letters."""
    return joined_lines(f"{type(error).__name__}: {error}")[:max_letters]


def printable(text: object) -> str:
    """Return a text for logs and messages in one line, in which control characters are escaped."""
    letters = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))
    return "".join(letters)


def logger_named(name: str, every_process: bool = False) -> logging.Logger:
    """Return a logger whose messages are `printable`, so that a file name cannot imitate another message.

    In a training of several processes, warnings come from the first one only, unless `every_process` is True.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_with_printable_message)
    if not every_process:
        logger.addFilter(_is_error_or_of_first_process)
    return logger


def _with_printable_message(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


def _is_error_or_of_first_process(record: logging.LogRecord) -> bool:
    """Whether a record is logged; torchrun and accelerate set the variable RANK of the environment."""
    return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"
