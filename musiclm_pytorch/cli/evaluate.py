"""`musiclm evaluate semantic | mulan`: what semantic tokens hold, and what a joint embedding of audio and text knows.

Of semantic tokens: how good an encoder's layers are, the tokens cut from them, and a tokenizer's own.
"""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from musiclm_pytorch.cli.checks import check_folder, device_named

if TYPE_CHECKING:
    from musiclm_pytorch.evaluation.mulan_check import MuLaNCheck
    from musiclm_pytorch.evaluation.semantic_check import SemanticCheck

__all__ = ["EvaluateCommand", "EvaluateMuLaN", "EvaluateSemantic", "run_evaluate"]

_REPORT_FILE = "metrics.json"
_MATRIX_FILE, _MAP_FILE = "similarities.png", "latents.png"
_TOKENIZER_CLASSES = ("KMeansTokenizer", "HubertWithKmeans", "FairseqVQWav2Vec")


@dataclass(frozen=True, kw_only=True)
class EvaluateSemantic:
    """Measure what an encoder's layers and their k-means tokens hold of melody and speech, beside log-mel frames.

    Of a semantic tokenizer its own tokens are measured too; of one without layers, such as vq-wav2vec, only these.
    """

    encoder: str
    """Bundled one (16khz), folder of a saved encoder or semantic tokenizer, a HuBERT checkpoint of fairseq (.pt),
    or a folder or hub id in transformers' format, e.g. facebook/hubert-base-ls960."""
    music: Path
    """Folder that `python -m musiclm_pytorch.recipes.corpus` wrote."""
    speech: Path
    """Folder of spoken digits: a train.jsonl with digit and speaker, files called digit_speaker_take."""
    out: Path
    """Folder to write metrics.json and metrics.md into."""
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
        return _words_of("semantic", asdict(self))


@dataclass(frozen=True, kw_only=True)
class EvaluateMuLaN:
    """Measure a joint embedding of audio and text on held-out clips, and draw what it makes of them.

    Retrieval in both directions, zero-shot tagging by the labels of the manifest, attributes of the top clips, all
    beside chance; the matrix of similarities and a map of the latents as pictures (needs the extra [plot]).
    """

    model: str
    """Bundled one (tiny); folder of a MuLaN, of a model, or of a run; or CLAP: a folder or hub id, e.g.
    laion/larger_clap_music."""
    data: Path
    """Folder with a valid.jsonl; or any folder or manifest of clips that have captions or labels."""
    out: Path
    """Folder to write metrics.json, metrics.md, similarities.png and latents.png into."""
    label: str | None = None
    """Label that orders and colours the pictures; the first of the manifest if not given."""
    limit: int | None = None
    """Use only so many clips, chosen at random."""
    seed: int = 0
    """Of that choice."""
    offline: bool = False
    """Never ask a model hub."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, mps, ... or auto, which takes a GPU if there is one."""

    @property
    def words(self) -> str:
        """The command line that says the same."""
        return _words_of("mulan", asdict(self))


EvaluateCommand = (
    Annotated[EvaluateSemantic, tyro.conf.subcommand("semantic")]
    | Annotated[EvaluateMuLaN, tyro.conf.subcommand("mulan")]
)


def _words_of(what: str, fields: dict[str, Any]) -> str:
    """The command line of some settings; those that are not given stay away."""
    settings = {name.replace("_", "-"): value for name, value in fields.items() if value is not None}
    offline = settings.pop("offline")
    parts = [f"--{name} {shlex.quote(str(value))}" for name, value in settings.items()]
    return " ".join(["musiclm evaluate", what, *parts, *(["--offline"] if offline else [])])


def run_evaluate(command: EvaluateSemantic | EvaluateMuLaN) -> int:
    """Carry a command out.

    Args:
        command: What to do.

    Returns:
        Exit status 0.

    Raises:
        ImportError: If pictures cannot be drawn, or a model needs a package that is not installed.
        ValueError: If nothing could be done; says what was wrong and the mend.
    """
    if isinstance(command, EvaluateMuLaN):
        _evaluate_mulan(command)
    else:
        _evaluate_semantic(command)
    return 0


def _evaluate_semantic(command: EvaluateSemantic) -> None:
    """What layers and tokens hold."""
    clusters = [] if command.clusters == "none" else _numbers("--clusters", command.clusters)
    layers = None if command.layers == "all" else _numbers("--layers", command.layers)
    if command.probe_clips < 1 or command.seed < 0:
        raise ValueError(
            f"need --probe-clips of at least 1 and --seed of at least 0, got {command.probe_clips}, {command.seed}"
        )
    if clusters and min(clusters) < 2:
        raise ValueError(f"--clusters must be at least 2 each, got {min(clusters)}")
    check_folder(command.out)

    encoder, tokenizer = _opened(command)
    if encoder is None and layers is not None:
        raise ValueError(f"--layers: {command.encoder} has no layers, only tokens; leave --layers out")
    checks = _checks(command, encoder, tokenizer, layers, clusters)
    _report(command, encoder, tokenizer, *checks)


def _opened(command: EvaluateSemantic) -> tuple[Any, Any]:
    """The encoder (None where there are no layers), and the tokenizer that it belongs to (None where there is none)."""
    from audiolm_pytorch.saving.modules import read_config
    from audiolm_pytorch.semantic.base import FrameEncoder
    from musiclm_pytorch.pretrained.bundled import BUNDLED_TOKENIZERS, encoder_named, tokenizer_named

    device, source = device_named(command.device), command.encoder
    if source not in BUNDLED_TOKENIZERS:
        folder = Path(source).expanduser()
        try:
            saved_class = read_config(folder)["class"]
        except ValueError:  # a checkpoint, a folder in transformers' format, a hub id, or nothing: encoder_named says
            saved_class = None
        if saved_class not in _TOKENIZER_CLASSES:
            return encoder_named(source, offline=command.offline).to(device), None
        source = str(folder)
    tokenizer = tokenizer_named(source, device)
    encoder = getattr(tokenizer, "encoder", None)
    return encoder if isinstance(encoder, FrameEncoder) else None, tokenizer


def _checks(
    command: EvaluateSemantic, encoder: Any, tokenizer: Any, layers: list[int] | None, clusters: list[int]
) -> "tuple[SemanticCheck | None, SemanticCheck | None]":
    """What layers hold, and what own tokens hold, each where there are any, on the same clips."""
    from musiclm_pytorch.evaluation.semantic_check import check_semantic, check_tokens
    from musiclm_pytorch.evaluation.semantic_data import ProbeSet, load_music, load_speech

    if encoder is not None:
        layers = list(range(encoder.depth + 1)) if layers is None else layers
        beyond = [layer for layer in layers if layer > encoder.depth]
        if beyond:
            there = f"{command.encoder} has layers 0..{encoder.depth}"
            raise ValueError(f"--layers: there is no layer {beyond[0]}, {there}")
    sample_hz = tokenizer.target_sample_hz if encoder is None else encoder.sample_hz
    music = load_music(command.music, sample_hz, command.probe_clips, command.seed)
    speech = load_speech(command.speech, sample_hz, command.probe_clips, command.seed)
    check = own = None
    if encoder is not None:
        check = check_semantic(encoder, music, speech, layers or [], clusters, command.seed, _announce)
        # wide layers may have had no room for all training clips: own tokens learn from no more than these
        music = ProbeSet(music.train[: check.num_clips["music, train"]], music.test)
        speech = ProbeSet(speech.train[: check.num_clips["speech, train"]], speech.test)
    if tokenizer is not None:
        own = check_tokens(tokenizer, music, speech)
    return check, own


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


def _report(
    command: EvaluateSemantic,
    encoder: Any,
    tokenizer: Any,
    check: "SemanticCheck | None",
    own: "SemanticCheck | None",
) -> None:
    """Print what was found, and write it down."""
    from musiclm_pytorch.evaluation.report import write_report
    from musiclm_pytorch.evaluation.semantic_report import judge, score_tables, verdict_tables

    scores = [score for one in (check, own) if one is not None for score in one.scores]
    metrics = [(score, score.metric()) for score in scores]
    settings = _settings(command, encoder, tokenizer, check or own)
    text, gains = _head(settings) + score_tables(metrics), []
    if check is not None:
        verdict = judge(check.scores)
        settings["verdict"] = asdict(verdict)
        text += "\n" + verdict_tables(verdict)
        gains = [*verdict.gains, *(gain for one in verdict.tokens for gain in one.gains)]
    sys.stdout.write(text)
    path = command.out / _REPORT_FILE
    write_report(path, [*(metric for _, metric in metrics), *gains], settings, text)
    sys.stdout.write(f"\nwrote {path} and {path.with_suffix('.md')}\n")


def _settings(command: EvaluateSemantic, encoder: Any, tokenizer: Any, check: Any) -> dict[str, Any]:
    """What was measured, on what."""
    from audiolm_pytorch.saving.fingerprint import part_fingerprint

    settings: dict[str, Any] = {"command": command.words, "encoder": command.encoder}
    if encoder is not None:
        settings |= {
            "encoder_class": type(encoder).__name__,
            "encoder_fingerprint": part_fingerprint(encoder),
            "depth": encoder.depth,
        }
    if tokenizer is not None:
        settings |= {
            "tokenizer_class": type(tokenizer).__name__,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "codebook_size": tokenizer.codebook_size,
        }
    return settings | {
        "sample_hz": tokenizer.target_sample_hz if encoder is None else encoder.sample_hz,
        "downsample_factor": (tokenizer if encoder is None else encoder).downsample_factor,
        "num_clips": check.num_clips,
        "num_frames": check.num_frames,
        "num_kmeans_frames": check.num_kmeans_frames,
        "seed": command.seed,
    }


def _head(settings: dict[str, Any]) -> str:
    """What was measured on what."""
    rate = f"{settings['sample_hz']} Hz, {settings['sample_hz'] / settings['downsample_factor']:g}"
    lines = [f"# Semantic check of {settings['encoder']}", "", f"    {settings['command']}", ""]
    if "encoder_class" in settings:
        name = f"{settings['encoder_class']} {settings['encoder_fingerprint']}"
        lines.append(f"- {name}: {rate} frames a second, layers 0..{settings['depth']}")
    if "tokenizer_class" in settings:
        name = f"{settings['tokenizer_class']} {settings['tokenizer_fingerprint']}"
        lines.append(f"- {name}: {rate} tokens a second, {settings['codebook_size']} different")
    for name, count in settings["num_clips"].items():
        lines.append(f"- {name}: {count} clips, {settings['num_frames'][name]} frames")
    if settings["num_kmeans_frames"]:
        learned = f"{settings['num_kmeans_frames']} training frames, three of music to one of speech"
        lines.append(f"- k-means on {learned}, seed {settings['seed']}")
    return "\n".join([*lines, "", ""])


def _evaluate_mulan(command: EvaluateMuLaN) -> None:
    """What a joint embedding knows: metrics and pictures."""
    from musiclm_pytorch.evaluation.mulan_check import check_metrics, check_mulan, held_out_items
    from musiclm_pytorch.evaluation.mulan_report import mulan_head, mulan_tables
    from musiclm_pytorch.evaluation.mulan_views import draw_latents, draw_similarities, label_named
    from musiclm_pytorch.evaluation.plots import require_matplotlib
    from musiclm_pytorch.evaluation.report import write_report
    from musiclm_pytorch.evaluation.tagging import tag_tests
    from musiclm_pytorch.pretrained.bundled import mulan_named

    require_matplotlib()
    check_folder(command.out)
    if command.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {command.seed}")
    mulan = mulan_named(command.model, device_named(command.device), command.offline)
    items = held_out_items(command.data, command.limit, command.seed)
    label_named(tag_tests(items), command.label)  # a wrong name shall not cost the measuring
    check = check_mulan(mulan, items, _announce)
    _announce("measuring")
    metrics, settings = check_metrics(check), _mulan_settings(command, mulan, check)
    text = mulan_head(settings) + mulan_tables(metrics)
    sys.stdout.write(text)
    path, title = command.out / _REPORT_FILE, f"{command.model} on {command.data}"
    write_report(path, metrics, settings, text)
    draw_similarities(check, command.out / _MATRIX_FILE, title, command.label)
    draw_latents(check, command.out / _MAP_FILE, title, command.label)
    pictures = f"{command.out / _MATRIX_FILE} and {command.out / _MAP_FILE}"
    sys.stdout.write(f"\nwrote {path}, {path.with_suffix('.md')}, {pictures}\n")


def _mulan_settings(command: EvaluateMuLaN, mulan: Any, check: "MuLaNCheck") -> dict[str, Any]:
    """What was measured, on what."""
    from audiolm_pytorch.saving.fingerprint import fingerprint_of

    return {
        "command": command.words,
        "model": command.model,
        "model_class": type(mulan).__name__,
        "model_fingerprint": fingerprint_of(mulan),
        "sample_hz": mulan.sample_hz,
        "dim_latent": mulan.dim_latent,
        "num_clips": len(check.audio),
        "num_texts": len(check.texts),
        "texts": "captions" if check.are_captions else f"prompts of {check.tests[0].label}",
        "prompts": {test.label: dict(zip(test.values, test.prompts)) for test in check.tests},
        "seed": command.seed,
    }
