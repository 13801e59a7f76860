"""Texts of error messages and logs in one line of printable letters; this module does not import torch."""

import logging

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


def logger_named(name: str) -> logging.Logger:
    """Return a logger whose messages are `printable`, so that a file name cannot imitate another message."""
    logger = logging.getLogger(name)
    logger.addFilter(_with_printable_message)
    return logger


def _with_printable_message(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True
