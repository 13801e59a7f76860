"""`musiclm evaluate semantic`: how good an encoder's layers are, and the tokens cut from them."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from musiclm_pytorch.command_checks import check_folder, device_named

if TYPE_CHECKING:
    from audiolm_pytorch.semantic import FrameEncoder
    from musiclm_pytorch.evaluation.semantic_check import SemanticCheck

__all__ = ["EvaluateCommand", "EvaluateSemantic", "run_evaluate"]

_REPORT_FILE = "figures.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateSemantic:
    """Measure what an encoder's layers and their k-means tokens hold of melody and speech, beside log-mel frames."""

    what: Annotated[Literal["semantic"], tyro.conf.Positional]
    """What is measured."""
    encoder: str
    """Folder of a saved encoder or semantic tokenizer, a fairseq checkpoint (.pt), or a folder or id of a published
    model."""
    music: Path
    """Folder that `musiclm corpus` wrote."""
    speech: Path
    """Folder of spoken digits: a train.jsonl with digit and speaker, files called digit_speaker_take."""
    out: Path
    """Folder to write figures.json and figures.md into."""
    layers: str = "all"
    """Layers with commas between them, e.g. 6,9,12; 0 is what the first layer gets."""
    clusters: str = "64,256,1024"
    """Numbers of k-means clusters with commas between them, or none."""
    probe_clips: int = 1000
    """Most training clips, and most test clips, of each kind."""
    seed: int = 0
    """Of the choice of clips and of k-means."""
    offline: bool = False
    """Never ask a model hub."""
    device: str = "auto"
    """Where the encoder runs: cpu, cuda, mps, ... or auto, which takes a GPU if there is one."""

    @property
    def words(self) -> str:
        """The command line that says the same."""
        settings = {name.replace("_", "-"): value for name, value in asdict(self).items() if name != "what"}
        offline = settings.pop("offline")
        parts = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.items()]
        return " ".join(["musiclm evaluate", self.what, *parts, *(["--offline"] if offline else [])])


# A union of such classes, once there is more to evaluate.
EvaluateCommand = EvaluateSemantic


def run_evaluate(command: EvaluateSemantic) -> int:
    """Carry a command out.

    Args:
        command: What to do.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If nothing could be done; says what was wrong and the mend.
    """
    clusters = [] if command.clusters == "none" else _numbers("--clusters", command.clusters)
    layers = None if command.layers == "all" else _numbers("--layers", command.layers)
    if command.probe_clips < 1 or command.seed < 0:
        raise ValueError(
            f"need --probe-clips of at least 1 and --seed of at least 0, got {command.probe_clips}, {command.seed}"
        )
    if clusters and min(clusters) < 2:
        raise ValueError(f"--clusters must be at least 2 each, got {min(clusters)}")
    check_folder(command.out)

    from audiolm_pytorch.semantic import FrameEncoder
    from audiolm_pytorch.semantic.pretrained import open_encoder
    from musiclm_pytorch.evaluation.semantic_check import check_semantic
    from musiclm_pytorch.evaluation.semantic_data import load_music, load_speech

    device = device_named(command.device)
    encoder = open_encoder(command.encoder, offline=command.offline).to(device)
    if not isinstance(encoder, FrameEncoder):
        raise ValueError(f"{command.encoder} holds a {type(encoder).__name__}, but an encoder with layers is needed")
    layers = list(range(encoder.depth + 1)) if layers is None else layers
    beyond = [layer for layer in layers if layer > encoder.depth]
    if beyond:
        raise ValueError(f"--layers: there is no layer {beyond[0]}, {command.encoder} has layers 0..{encoder.depth}")
    music = load_music(command.music, encoder.sample_hz, command.probe_clips, command.seed)
    speech = load_speech(command.speech, encoder.sample_hz, command.probe_clips, command.seed)
    check = check_semantic(encoder, music, speech, layers, clusters, command.seed, _announce)
    _report(command, encoder, check)
    return 0


def _numbers(option: str, words: str) -> list[int]:
    """The different numbers of "64,256,1024"."""
    try:
        numbers = list(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ValueError(f"{option} takes numbers with commas between them, e.g. 1,2,3; got {words!r}")
    return numbers


def _announce(words: str) -> None:
    """Say what is done, to somebody who watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{words}\n")


def _report(command: EvaluateSemantic, encoder: "FrameEncoder", check: "SemanticCheck") -> None:
    """Print what was found, and write it down."""
    from musiclm_pytorch.evaluation.report import write_report
    from musiclm_pytorch.evaluation.semantic_report import judge, score_tables, verdict_tables

    figures = [(score, score.figure()) for score in check.scores]
    verdict = judge(check.scores)
    settings: dict[str, Any] = {
        "command": command.words,
        "encoder": command.encoder,
        "encoder_class": type(encoder).__name__,
        "encoder_fingerprint": _fingerprint(encoder),
        "sample_hz": encoder.sample_hz,
        "downsample_factor": encoder.downsample_factor,
        "depth": encoder.depth,
        "num_clips": check.num_clips,
        "num_frames": check.num_frames,
        "num_kmeans_frames": check.num_kmeans_frames,
        "seed": command.seed,
        "verdict": asdict(verdict),
    }
    text = _head(settings) + score_tables(figures) + "\n" + verdict_tables(verdict)
    sys.stdout.write(text)
    gains = [*verdict.gains, *(gain for one in verdict.tokens for gain in one.gains)]
    path = command.out / _REPORT_FILE
    write_report(path, [*(figure for _, figure in figures), *gains], settings, text)
    sys.stdout.write(f"\nwrote {path} and {path.with_suffix('.md')}\n")


def _fingerprint(encoder: "FrameEncoder") -> str:
    """What identifies the encoder: its own fingerprint, or one over its numbers and weights."""
    from torch import nn

    from audiolm_pytorch.io import fingerprint_of

    own = getattr(encoder, "fingerprint", None)
    if isinstance(own, str) or not isinstance(encoder, nn.Module):
        return str(own)
    return fingerprint_of(encoder)


def _head(settings: dict[str, Any]) -> str:
    """What was measured on what."""
    rate = settings["sample_hz"] / settings["downsample_factor"]
    counts = [
        f"- {name}: {count} clips, {settings['num_frames'][name]} frames"
        for name, count in settings["num_clips"].items()
    ]
    lines = [
        f"# Semantic check of {settings['encoder']}",
        "",
        f"    {settings['command']}",
        "",
        f"- {settings['encoder_class']} {settings['encoder_fingerprint']}: {settings['sample_hz']} Hz, {rate:g} frames "
        f"a second, layers 0..{settings['depth']}",
        *counts,
        f"- k-means on {settings['num_kmeans_frames']} training frames, three of music to one of speech, seed "
        f"{settings['seed']}",
        "",
    ]
    return "\n".join(lines) + "\n"
