"""The `musiclm` command: make music, train models, render the corpus."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["main"]


@dataclass(frozen=True)
class Generate:
    """Turn a sentence into music: sample several candidates and keep the one that MuLaN ranks best."""

    text: tyro.conf.Positional[str]
    """What it should sound like, e.g. "a fast jig played on the flute"."""
    model: str = "tiny"
    """Name of a bundled model, or the folder of a trained one."""
    seconds: float = 5.0
    """Length in seconds, rounded up to whole frames."""
    num_samples: int = 4
    """Candidates to choose from."""
    seed: int = 0
    """Candidate i is sampled with seed + i: the same command gives the same music."""
    out: Path = Path("music.wav")
    """File to write (.wav, .flac or .ogg); its folder is made if missing."""
    plot: Path | None = None
    """Also draw wave and mel spectrogram into this PNG (needs the [plot] extra)."""


@dataclass(frozen=True)
class Train:
    """Train one stage, or all of them in order; what is unfinished is continued, what is finished is kept."""

    stage: tyro.conf.Positional[str]
    """all, or one of: codec, semantic-tokenizer, mulan, quantizer, semantic, coarse, fine."""
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
    dry_run: bool = False
    """Only print parameters, tokens, disk and estimated time."""


@dataclass(frozen=True)
class Corpus:
    """Compose and render the captioned training corpus (needs fluidsynth and its GM soundfont)."""

    out: Path
    """Folder for clips and manifests."""
    num_train: int = 2400
    """Training clips of 5 seconds."""
    num_valid: int = 200
    """Held-out clips."""
    seed: int = 0
    """The same seed gives the same corpus."""


@dataclass(frozen=True)
class Export:
    """Write the model of a finished run as fp16 weights for inference."""

    run: Path
    """Folder that `musiclm train all --out` wrote."""
    out: Path
    """Folder to write."""


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Corpus, tyro.conf.subcommand("corpus")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after `musiclm`; those of the process if not given.

    Returns:
        Exit status: 0, or 2 with one line on standard error that names what was wrong and the mend.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    command = tyro.cli(Command, prog="musiclm", description=__doc__, args=arguments)  # type: ignore[call-overload]
    runners = {Generate: _generate, Train: _train, Corpus: _corpus, Export: _export}
    try:
        runners[type(command)](command)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"musiclm: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("musiclm: stopped; the same command continues\n")
        return 130
    return 0


def _generate(command: Generate) -> None:
    from audiolm_pytorch.audio import write_audio
    from musiclm_pytorch.bundle import load_musiclm

    if not command.text.strip():
        raise ValueError('the text is empty; say what to play, e.g. "a slow waltz on the cello"')
    if command.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {command.num_samples}")
    if not command.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {command.seconds:g}")
    if command.seed < 0:
        raise ValueError(f"--seed must not be negative, got {command.seed}")
    _require_audio_suffix(command.out)
    musiclm = load_musiclm(command.model)
    candidates = musiclm(
        command.text, num_samples=command.num_samples, seconds=command.seconds, seed=command.seed, return_all=True
    )
    best = int(candidates.order[0, 0])
    wave = candidates.waves[0, best]
    write_audio(command.out, wave, candidates.sample_hz)
    for number, (score, seed) in enumerate(zip(candidates.scores[0].tolist(), candidates.seeds)):
        print(f"candidate {number + 1}  seed {seed}  similarity {score:.3f}{'  <- kept' if number == best else ''}")
    print(f"wrote {command.out}")
    if command.plot is not None:
        from musiclm_pytorch.plot import plot_wave

        plot_wave(wave, candidates.sample_hz, command.plot, title=command.text)
        print(f"drew {command.plot}")


def _require_audio_suffix(path: Path) -> None:
    if path.suffix.lower() not in (".wav", ".flac", ".ogg"):
        raise ValueError(f"cannot write {path}: name a .wav, .flac or .ogg file")


def _train(command: Train) -> None:
    from musiclm_pytorch.config import preset_named
    from musiclm_pytorch.pipeline import Pipeline

    pipeline = Pipeline(
        preset_named(command.preset).scaled(command.scale), data=command.data, out=command.out, seed=command.seed
    )
    if command.dry_run:
        from musiclm_pytorch.estimate import estimate

        print(estimate(pipeline))
        return
    for report in pipeline.run(command.stage):
        print(f"{report.stage:20} {report.seconds / 60:7.1f} min  {report.summary}")
    if pipeline.is_complete:
        print(f'model in {pipeline.model_folder}; try: musiclm generate "a slow waltz" --model {pipeline.model_folder}')


def _corpus(command: Corpus) -> None:
    from musiclm_pytorch.recipes.corpus import make_corpus

    make_corpus(command.out, num_train=command.num_train, num_valid=command.num_valid, seed=command.seed)
    print(f"wrote {command.num_train} training and {command.num_valid} held-out clips to {command.out}")


def _export(command: Export) -> None:
    from musiclm_pytorch.bundle import export_musiclm

    num_bytes = export_musiclm(command.run, command.out)
    print(f"wrote {command.out}, {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
