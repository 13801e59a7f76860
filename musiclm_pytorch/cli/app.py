"""The `musiclm` command, which parses its arguments and runs the selected subcommand."""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from musiclm_pytorch.cli.codec import CodecCommand
from musiclm_pytorch.cli.convert import ConvertCommand
from musiclm_pytorch.cli.evaluate import EvaluateCommand
from musiclm_pytorch.cli.export import Export
from musiclm_pytorch.cli.generate import Generate
from musiclm_pytorch.cli.kmeans import TrainKmeans
from musiclm_pytorch.cli.train import Train

__all__ = ["main"]

Command = (
    Generate
    | Train
    | Export
    | Annotated[
        CodecCommand, tyro.conf.subcommand("codec", description="Encode, decode and evaluate audio with a codec.")
    ]
    | Annotated[
        ConvertCommand,
        tyro.conf.subcommand("convert", description="Convert published checkpoints to safetensors, and MusicCaps."),
    ]
    | Annotated[
        EvaluateCommand,
        tyro.conf.subcommand("evaluate", description="Evaluate a semantic tokenizer or encoder, or a MuLaN or CLAP."),
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `musiclm` command with `arguments`, by default the command-line arguments of the process.

    The returned exit status is 0 after success, 2 after an error that is printed on standard error, 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:2] == ["train", "kmeans"]:  # `train` expects a step there, and kmeans has other options
            return tyro.cli(TrainKmeans, prog="musiclm train kmeans", args=words[2:]).execute()
        description = "Generate music from text, and train, convert and evaluate the models for it."
        command: Any = tyro.cli(Command, prog="musiclm", description=description, args=words)
        return int(command.execute())
    except SystemExit as stop:  # tyro has printed the help text, or what is wrong with the arguments
        return int(stop.code or 0)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"musiclm: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("musiclm: interrupted; run the same command again, and training continues", file=sys.stderr)
        return 130
