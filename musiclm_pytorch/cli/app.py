"""The `musiclm` command, which parses its arguments and runs the selected subcommand."""

import atexit
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

from audiolm_pytorch import __version__
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.cli.checks import check_words, log_to_standard_error, printable_line
from musiclm_pytorch.cli.commands import help_text, parse_options, split_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `musiclm` command with `arguments`, by default the command-line arguments of the process.

    The returned exit status is 0 after success, 2 after an error that is printed on standard error, 130 after Ctrl-C,
    129 after SIGHUP, 141 if the reader of standard output has ended, and 143 after SIGTERM.
    """
    if sys.stderr is None:  # closed by the shell, as by 2>&-
        sys.stderr = open(os.devnull, "w")
    # Importing torch creates 300,000 objects; with the default threshold, they would be searched 400 times for garbage.
    gc.set_threshold(10_000, 10, 10)
    # At its end, Python would search them once more, which takes 0.4 s.
    atexit.register(gc.freeze)
    log_to_standard_error()
    logger_named("audiolm_pytorch.saving.sources").setLevel(logging.INFO)  # the licence of every model
    logger_named("audiolm_pytorch.training.tracking").setLevel(logging.INFO)  # the progress of a training
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_words(words)
        if words[:1] in (["--version"], ["-V"], ["version"]):
            print(f"musiclm {__version__}")
            return 0
        name, rest = split_command(words)
        if not name:
            print(help_text(*rest))
            return 0
        command = parse_options(name, rest)
        from audiolm_pytorch.training.stopping import stop_signals

        with stop_signals(at_once=True):
            status = int(command.execute())
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe is an error of the command
        return status
    except SystemExit as stop:  # tyro has printed the help of a command
        return int(stop.code or 0)
    except BrokenPipeError:  # as in `musiclm ... | head`
        _discard_unwritten_output()
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = printable_line(str(error)) or type(error).__name__
        if _discard_unwritten_output() and isinstance(error, OSError) and error.filename is None:
            message = f"cannot write to standard output: {error.strerror}"
        print(f"musiclm: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "interrupted"
        hint = "; run the same command again, and training continues" if words[:1] == ["train"] else ""
        print(f"musiclm: {reason}{hint}", file=sys.stderr)
        return 130


def _discard_unwritten_output() -> bool:
    """Discard text that standard output refuses, because Python would report it a second time when it ends.

    Return whether there is such text.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
