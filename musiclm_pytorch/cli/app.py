"""The `musiclm` command, which parses its arguments and runs the selected subcommand."""

import atexit
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro

from audiolm_pytorch.saving.text import logger_named, printable
from musiclm_pytorch.cli.checks import OneLineFormatter, check_words, printable_line
from musiclm_pytorch.cli.settings import PresetOptions, split_settings

__all__ = ["main"]

# Command (and module of this package) -> class in the module, and a description if the class has none.
_COMMANDS = {
    "generate": ("Generate", None),
    "train": ("Train", None),
    "export": ("Export", None),
    "codec": ("CodecCommand", "Encode, decode and evaluate audio with a codec."),
    "convert": ("ConvertCommand", "Convert published checkpoints to safetensors, and MusicCaps."),
    "evaluate": ("EvaluateCommand", "Evaluate generated music, a semantic tokenizer or encoder, or a MuLaN or CLAP."),
    "plot": ("Plot", None),
}
# Words after `train` that are no steps of the pipeline and have other options (and modules) -> class in the module.
_TRAININGS = {"kmeans": "TrainKmeans", "musicgen": "TrainMusicGen"}


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
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger_named("audiolm_pytorch.saving.sources").setLevel(logging.INFO)  # the licence of every model
    logger_named("audiolm_pytorch.training.tracking").setLevel(logging.INFO)  # the progress of a training
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_words(words)
        if words[:1] == ["train"] and words[1:2] and words[1] in _TRAININGS:
            class_ = getattr(import_module(f"musiclm_pytorch.cli.{words[1]}"), _TRAININGS[words[1]])
            command = _parsed(class_, words[2:], prog=f"musiclm train {words[1]}")
        elif words and words[0] in _COMMANDS:  # the modules of the other commands are not imported
            class_, about = _command(words[0])
            command = _parsed(class_, words[1:], prog=f"musiclm {words[0]}", description=about)
        else:
            subcommands: list[Any] = []
            for name in _COMMANDS:
                class_, about = _command(name)
                subcommands.append(Annotated[class_, tyro.conf.subcommand(name, description=about)])
            about = "Generate music from text, and train, convert and evaluate the models for it."
            commands: Any = reduce(or_, subcommands)
            command = _parsed(commands, words, prog="musiclm", description=about)
        from audiolm_pytorch.training.stopping import stop_signals

        with stop_signals(at_once=True):
            status = int(command.execute())
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe is an error of the command
        return status
    except SystemExit as stop:  # tyro has printed the help text, or what is wrong with the arguments
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


def _parsed(class_: Any, words: Sequence[str], **options: Any) -> Any:
    """Parse the words of a command; the help text, or what is wrong, is printed without control characters."""
    if isinstance(class_, type) and issubclass(class_, PresetOptions):
        words, settings = split_settings(class_, words)
        return replace(_parsed_options(class_, words, **options), settings=settings)
    return _parsed_options(class_, words, **options)


def _parsed_options(class_: Any, words: Sequence[str], **options: Any) -> Any:
    try:
        return tyro.cli(class_, args=words, console_outputs=False, **options)
    except SystemExit:
        return tyro.cli(class_, args=[printable(word) for word in words], **options)


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


def _command(name: str) -> tuple[Any, str | None]:
    """Import the class of a command; return it with its description (None = the docstring of the class)."""
    class_name, description = _COMMANDS[name]
    return getattr(import_module(f"musiclm_pytorch.cli.{name}"), class_name), description
