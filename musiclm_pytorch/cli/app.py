"""The `musiclm` command: make music, train models, use a codec, convert and measure encoders."""

import contextlib
import io
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from musiclm_pytorch.cli.checks import check_file, device_named
from musiclm_pytorch.cli.codec import CodecCommand, run_codec
from musiclm_pytorch.cli.convert import ConvertCommand, run_convert
from musiclm_pytorch.cli.evaluate import EvaluateCommand, run_evaluate
from musiclm_pytorch.cli.kmeans import TrainKmeans, run_train_kmeans

__all__ = ["main"]


@dataclass(frozen=True)
class Generate:
    """Turn a sentence into music: sample several candidates and keep the one that MuLaN ranks best."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What it should sound like, e.g. "a fast jig played on the flute"."""
    model: str = "tiny"
    """Name of a bundled model, or the folder of a trained one."""
    seconds: float = 5.0
    """Length in seconds, rounded up to whole frames."""
    num_samples: int = 4
    """Candidates to choose from."""
    seed: int = 0
    """Candidate i is sampled with seed + i: the same command gives the same music."""
    device: str = "auto"
    """Where to compute: cpu, cuda, mps, ... or auto, which takes a GPU if there is one."""
    continue_from: Path | None = None
    """Audio file to go on from, of any rate; --seconds counts it in."""
    out: Path = Path("music.wav")
    """File to write (.wav, .flac or .ogg); its folder is made if missing."""
    plot: Path | None = None
    """Also draw wave and mel spectrogram into this PNG (needs the [plot] extra)."""


@dataclass(frozen=True)
class Train:
    """Train one stage, or all in order; unfinished ones are continued. Any encoder to tokens: `train kmeans --help`."""

    stage: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STAGE")]
    """all, or one of: codec, semantic-tokenizer, mulan, quantizer, tokens, semantic, coarse, fine."""
    data: Path
    """Folder of audio files, or a folder or file with a JSONL manifest (audio, caption, labels)."""
    out: Path
    """Folder of the run: checkpoints, metrics, and at the end the model in OUT/model."""
    preset: str = "tiny"
    """Sizes and steps: tiny (two CPU cores) or small (one GPU)."""
    scale: float = 1.0
    """Multiplies all step counts."""
    seed: int = 0
    """Of initial weights, data order and noise."""
    codec: str | None = None
    """Finished codec instead of training one: 16khz (bundled), a folder, or a hub id."""
    semantic_tokenizer: str | None = None
    """Finished semantic tokenizer instead of training one: 16khz (bundled), or a folder."""
    mulan: str | None = None
    """Finished MuLaN or CLAP instead of training one: tiny (bundled), a folder, or a hub id of CLAP."""
    offline: bool = False
    """Keep off the network: a hub id is then served from the local cache or refused."""
    dry_run: bool = False
    """Only print parameters, tokens, disk and estimated time; writes nothing."""


@dataclass(frozen=True)
class Export:
    """Write the model of a finished run as fp16 weights for inference."""

    run: Path
    """Folder that `musiclm train all --out` wrote."""
    out: Path
    """Folder to write."""
    share_bundled: bool = False
    """Name the parts that come with the package instead of copying them; the model needs an installation with them."""


@dataclass(frozen=True)
class Codec:
    """Use a codec on its own: sounds to codes and back, and how good it is."""

    action: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[CodecCommand]]


@dataclass(frozen=True)
class Convert:
    """Write what others published in formats of here: pickled checkpoints as safetensors, MusicCaps as a manifest."""

    action: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[ConvertCommand]]


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder and its semantic tokens, or a joint embedding of audio and text."""

    action: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[EvaluateCommand]]


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Codec, tyro.conf.subcommand("codec")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)
# Commands of two words whose first word is a command of its own: the stage of `musiclm train STAGE` is an argument, and
# kmeans shares none of its options.
_LONGER_COMMANDS: dict[tuple[str, ...], type] = {("train", "kmeans"): TrainKmeans}

_AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
_MOST_SECONDS = 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after `musiclm`; those of the process if not given.

    Returns:
        Exit status: 0, or 2 with one line on standard error that names what was wrong and the mend.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        match _parse(arguments):
            case Generate() as command:
                _generate(command)
            case Train() as command:
                _train(command)
            case Export() as command:
                _export(command)
            case Codec(action):
                return run_codec(action)
            case Convert(action):
                return run_convert(action)
            case Evaluate(action):
                return run_evaluate(action)
            case TrainKmeans() as command:
                return run_train_kmeans(command)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"musiclm: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("musiclm: stopped; the same command starts again, and training continues where it was\n")
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> Any:
    """The command, None after a help text, or a ValueError that says in one line what tyro says in a box."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    kind: Any = _LONGER_COMMANDS.get(tuple(words[:2]), Command)
    name, words = ("musiclm", words) if kind is Command else (f"musiclm {' '.join(words[:2])}", words[2:])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=name, description=__doc__ if kind is Command else None, args=words)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(_in_one_line(said.getvalue(), name)) from None


def _in_one_line(box: str, name: str) -> str:
    """Shorten tyro's boxed explanation to what is wrong and what may have been meant."""
    lines = box.splitlines()
    if box.startswith(("╭", "+")):
        lines = [re.sub("^[│|] ?| *[│|]$", "", line) for line in lines if not line.startswith(("╭", "╰", "+"))]
    else:  # an encoding without box characters: title, rule, and everything else indented by two
        lines = [line[2:].rstrip() for line in lines[2:]]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.strip("─- "):
            sections[-1].append(line)
        else:
            sections.append([])
    wrong, *further = sections
    message = " ".join(line.strip() for line in wrong if not line.startswith(" ")).rstrip(".")
    # arguments stand at a depth of four, their help deeper
    names = [line.strip() for line in wrong if re.match(" {4}[^ ]", line)]
    by_start = {section[0].split()[0]: section for section in further if section}
    meant = [line.strip() for line in by_start.get("Perhaps", []) if re.match(" {4}--", line)]
    maybe = f"; perhaps {meant[0]}" if meant else ""
    choice = f"; {' '.join(by_start['Available'])}" if "Available" in by_start else ""
    return f"{message} {', '.join(names)}".rstrip() + f"{maybe}{choice}; see {name} --help"


def _generate(command: Generate) -> None:
    if not command.text.strip():
        raise ValueError('the text is empty; say what to play, e.g. "a slow waltz on the cello"')
    if command.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {command.num_samples}")
    if not 0 < command.seconds <= _MOST_SECONDS:
        raise ValueError(f"--seconds must be above 0 and at most {_MOST_SECONDS}, got {command.seconds:g}")
    if command.seed < 0:
        raise ValueError(f"--seed must not be negative, got {command.seed}")
    check_file(command.out, _AUDIO_SUFFIXES)
    if command.plot is not None:
        from musiclm_pytorch.evaluation.plots import PICTURE_SUFFIXES, require_matplotlib

        check_file(command.plot, PICTURE_SUFFIXES)
        require_matplotlib()

    from audiolm_pytorch.audio.files import write_audio
    from musiclm_pytorch.pretrained.model_folder import load_musiclm

    musiclm = load_musiclm(command.model, device=device_named(command.device))
    candidates = musiclm(
        command.text,
        num_samples=command.num_samples,
        seconds=command.seconds,
        seed=command.seed,
        return_all=True,
        progress=True,
        prime_wave=command.continue_from,
    )
    best = int(candidates.order[0, 0])
    wave = candidates.waves[0, best]
    if not wave.isfinite().all():
        raise RuntimeError(f"the model {command.model} made no sound but NaN; train it longer or take another")
    write_audio(command.out, wave, candidates.sample_hz)
    for number, (score, seed) in enumerate(zip(candidates.scores[0].tolist(), candidates.seeds[0])):
        print(f"candidate {number + 1}  seed {seed}  similarity {score:.3f}{'  <- kept' if number == best else ''}")
    print(f"wrote {command.out}")
    if command.plot is not None:
        from musiclm_pytorch.evaluation.plots import plot_wave

        plot_wave(wave, candidates.sample_hz, command.plot, title=command.text)
        print(f"drew {command.plot}")


def _train(command: Train) -> None:
    from musiclm_pytorch.pipeline.pipeline import Pipeline, check_stage
    from musiclm_pytorch.pipeline.presets import preset_named

    if (command.stage,) in {longer[1:] for longer in _LONGER_COMMANDS}:
        raise ValueError(f"write {command.stage} right behind train: musiclm train {command.stage} --help")
    check_stage(command.stage)
    preset = preset_named(command.preset).scaled(command.scale)
    pipeline = Pipeline(preset, data=command.data, out=command.out, seed=command.seed, given=_given_parts(command))
    if command.dry_run:
        from musiclm_pytorch.pipeline.estimate import estimate

        print(estimate(pipeline, command.stage))
        return
    total = 0.0
    for report in pipeline.run(command.stage, announce=_announce):
        total += report.seconds
        if pipeline.accelerator.is_main_process:
            print(f"{report.stage:20} {_duration(report.seconds)}  {report.summary}".rstrip(), flush=True)
    if not pipeline.accelerator.is_main_process:
        return
    print(f"{'total':20} {_duration(total)}")
    if pipeline.is_complete:
        named = shlex.quote(str(pipeline.model_folder))
        print(f'model in {pipeline.model_folder}; try: musiclm generate "a slow waltz" --model {named}')


def _given_parts(command: Train) -> dict[str, Any]:
    """The finished parts that a training is told to use, opened."""
    from musiclm_pytorch.pretrained.bundled import codec_named, mulan_named, tokenizer_named

    given: dict[str, Any] = {}
    if command.codec is not None:
        given["codec"] = codec_named(command.codec, offline=command.offline)
    if command.semantic_tokenizer is not None:
        given["semantic-tokenizer"] = tokenizer_named(command.semantic_tokenizer)
    if command.mulan is not None:
        given["mulan"] = mulan_named(command.mulan, offline=command.offline)
    return given


def _announce(stage: str) -> None:
    """Say what is going on, to somebody who watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{stage} ...\n")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:7.1f} min" if seconds >= 60 else f"{seconds:7.1f} s  "


def _export(command: Export) -> None:
    from musiclm_pytorch.pretrained.model_folder import export_musiclm

    num_bytes = export_musiclm(command.run, command.out, share_bundled=command.share_bundled)
    print(f"wrote {command.out}, {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
