"""The `musiclm` command: parse the arguments and run one of the commands."""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from musiclm_pytorch.cli.codec import CodecCommand, run_codec
from musiclm_pytorch.cli.convert import ConvertCommand, Hubert, MusicCaps, VqWav2vec, run_convert
from musiclm_pytorch.cli.evaluate import EvaluateCommand, EvaluateMuLaN, EvaluateSemantic, run_evaluate
from musiclm_pytorch.cli.export import Export, run_export
from musiclm_pytorch.cli.generate import Generate, run_generate
from musiclm_pytorch.cli.kmeans import TrainKmeans, run_train_kmeans
from musiclm_pytorch.cli.train import Train, run_train

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
    """Run the command line with `arguments`, by default those of the process.

    Returns the exit status: 0, 2 after an error with its reason on standard error, or 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:2] == ["train", "kmeans"]:  # `train` expects a step there, and kmeans has other options
            return run_train_kmeans(tyro.cli(TrainKmeans, prog="musiclm train kmeans", args=words[2:]))
        description = "Generate music from text, and train, convert and evaluate the models for it."
        return _run(tyro.cli(Command, prog="musiclm", description=description, args=words))
    except SystemExit as stop:  # tyro has printed the help text, or what is wrong with the arguments
        return int(stop.code or 0)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"musiclm: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("musiclm: interrupted; run the same command again, and training continues", file=sys.stderr)
        return 130


def _run(command: Any) -> int:
    match command:
        case Generate():
            return run_generate(command)
        case Train():
            return run_train(command)
        case Export():
            return run_export(command)
        case Hubert() | VqWav2vec() | MusicCaps():
            return run_convert(command)
        case EvaluateSemantic() | EvaluateMuLaN():
            return run_evaluate(command)
        case _:
            return run_codec(command)
