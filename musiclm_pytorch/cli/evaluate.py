"""`musiclm evaluate music | semantic | mulan`: measure generated music, a semantic encoder, or a joint embedding."""

import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from audiolm_pytorch.saving.text import logger_named, printable
from musiclm_pytorch.cli.checks import (
    ModelOptions,
    check_at_least,
    check_folder,
    check_needs,
    check_seconds,
    device_named,
    option_name,
)

__all__ = ["EvaluateMuLaN", "EvaluateMusic", "EvaluateSemantic"]

logger = logger_named(__name__)

_REPORT_FILE = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class _Evaluation(ModelOptions, ABC):
    plot_file: ClassVar[str] = ""

    out: Path
    """Folder for metrics.json and metrics.md."""
    seed: int = 0
    """Seed of the choice of clips, and of k-means."""
    device: str = "auto"
    """Device of the model: cpu, cuda, mps, ..., or auto, which uses a GPU if there is one."""

    def execute(self) -> int:
        """Check the seed, evaluate the model and return the exit status 0."""
        from audiolm_pytorch.saving.ownership import check_overwrite

        check_at_least(self, seed=0)
        check_folder(self.out)
        check_overwrite(
            self.out / _REPORT_FILE,
            ("format_version", "settings", "metrics"),
            [self.out / name for name in (Path(_REPORT_FILE).with_suffix(".md").name, self.plot_file) if name],
        )
        self.evaluate()
        return 0

    @abstractmethod
    def evaluate(self) -> None:
        """Evaluate the model, print a table and write a report."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSemantic(_Evaluation):
    """Measure how well a linear classifier predicts labels from encoder layers, semantic tokens and log-mel frames."""

    encoder: str
    """Bundled one (semantic_16khz), folder of a saved encoder or semantic tokenizer, HuBERT checkpoint
    of fairseq (.pt), or folder or hub id in transformers' format, e.g. facebook/hubert-base-ls960."""
    data: Path
    """Folder with train.jsonl and valid.jsonl, or one manifest, of which some clips are then held out."""
    labels: tuple[str, ...]
    """Fields of the manifest: a value per clip, or a list of events [start_seconds, end_seconds, name]."""
    layers: tuple[int, ...] = ()
    """Layers of the encoder; 0 is the input of the first layer. All if not given."""
    clusters: tuple[int, ...] = ()
    """Also probe k-means tokens of log-mel frames and layers, with these numbers of clusters."""
    limit: int = 500
    """Largest number of training clips, and of held-out clips."""

    def evaluate(self) -> None:
        """Evaluate the encoder or tokenizer, print a table and write a report."""
        _evaluate_semantic(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateMuLaN(_Evaluation):
    """Measure a joint embedding of audio and text on held-out clips.

    The metrics are retrieval in both directions, zero-shot tagging with the labels of the manifest, and whether the
    best clip for a caption has the right labels. Plots of clip-caption similarity need matplotlib (extra [plot]).
    """

    plot_file = "similarities.png"

    model: str
    """Bundled one (tiny); folder of a MuLaN, of a model, or of a run; or CLAP: a folder or hub id, e.g.
    laion/larger_clap_music."""
    data: Path
    """Folder with a valid.jsonl; or any folder or manifest of clips with captions or labels."""
    out: Path
    """Folder for metrics.json, metrics.md and similarities.png."""
    label: str | None = None
    """Label that orders the plot; the first of the manifest if not given."""
    limit: int | None = None
    """Use only this number of clips, drawn at random."""

    def evaluate(self) -> None:
        """Evaluate the joint embedding, print a table and write a report."""
        _evaluate_mulan(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateMusic(_Evaluation):
    """Compare generated music with real clips.

    The metrics are Fréchet and kernel distance, KL divergence, inception score, similarity to the captions (CLAP score,
    MuLan cycle consistency), retrieval, labels found by a classifier, instrument tags of musicnn, beat and tempo,
    chroma, diversity, novelty and memorisation. A metric without the clips or labels that it needs is left out. Every
    value has a bootstrap interval; real clips, or two halves of them, show the best value that can be expected.
    """

    plot_file = "metrics.png"

    out: Path
    """Folder for metrics.json, metrics.md, and new clips."""
    generated: tuple[Path, ...] = ()
    """Folders or manifests (.jsonl) of generated clips. The field `reference` of a manifest is the file name of the
    real clip with the same caption; without it, files of equal names belong together."""
    real: Path | None = None
    """Manifest or folder (with a valid.jsonl, or any audio) of real clips that the model was not trained on."""
    musiccaps: Path | None = None
    """Table musiccaps-public.csv; --real is then the folder of its clips."""
    training: Path | None = None
    """Clips that the model was trained on, for novelty and memorisation."""
    labelled: Path | None = None
    """Real clips with labels (instrument, tempo, ...), to which a classifier is fitted."""
    classifier: Path | None = None
    """Folder of the classifier; it is written if it does not exist."""
    model: str | None = None
    """Model that generates clips from --captions: a bundled one (tiny), or a folder."""
    captions: Path | None = None
    """Manifest or MusicCaps table with captions; by default the captions of the real clips."""
    num_samples: int | None = None
    """Candidates of --model per caption (default 4); MuLan selects the best one."""
    codec: str | None = None
    """Also measure copies of the real clips by this codec: a bundled one (codec_16khz), a folder or a hub id."""
    seconds: float | None = None
    """Length of generated clips (default 5), and of the first part of all clips that is used (default: all)."""
    mulan: str = "tiny"
    """MuLan of the metrics: a bundled one, or a folder."""
    clap: str | None = None
    """CLAP of the metrics: a folder or hub id in transformers' format, e.g. laion/larger_clap_music."""
    tokenizer: str | None = None
    """Semantic tokenizer for memorisation of --training (default semantic_16khz)."""
    metrics: tuple[str, ...] = ()
    """Compute only metrics whose name contains one of these texts, e.g. beat musicnn."""
    limit: int | None = None
    """Use only this number of clips of each set; real clips are drawn at random."""

    def evaluate(self) -> None:
        """Generate clips if asked to, measure all sets, print a table and write a report."""
        _evaluate_music(self)


def _command_line(name: str, command: EvaluateSemantic | EvaluateMuLaN | EvaluateMusic) -> str:
    """Return the command line that runs `command` again."""
    words = ["musiclm", "evaluate", name]
    for option, value in asdict(command).items():
        if value is None or value is False or value == ():
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [option_name(option), *map(str, values)]
    return shlex.join(words)


def _announce(message: str) -> None:
    """Print a progress message on standard error if standard error is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{message}\n")


def _evaluate_semantic(command: EvaluateSemantic) -> None:
    from audiolm_pytorch.saving.fingerprint import part_fingerprint
    from musiclm_pytorch.evaluation.semantic_probes import evaluate_semantic, load_probe_clips, probe_table

    if command.limit < 2 or not command.labels or min(command.clusters, default=2) < 2:
        raise ValueError(
            "need one or more --labels, and at least 2 for --limit and for each of --clusters; "
            f"got --labels {command.labels}, --limit {command.limit}, --clusters {command.clusters}"
        )
    encoder, tokenizer = _open_encoder(command)
    layers = command.layers or tuple(range(0 if encoder is None else encoder.depth + 1))
    depth = -1 if encoder is None else encoder.depth
    if not all(0 <= layer <= depth for layer in layers):
        available = "no layers, only tokens; leave --layers out" if encoder is None else f"layers 0..{depth}"
        raise ValueError(f"got --layers {layers}, but the encoder {command.encoder} has {available}")
    sample_hz = encoder.sample_hz if encoder is not None else tokenizer.target_sample_hz
    hop_samples = (encoder if encoder is not None else tokenizer).downsample_factor
    clips = load_probe_clips(command.data, 2 * hop_samples / sample_hz, command.limit, command.seed)
    metrics = evaluate_semantic(
        clips, command.labels, encoder, tokenizer, layers, command.clusters, command.seed, _announce
    )
    settings = {
        "command": _command_line("semantic", command),
        "fingerprint": part_fingerprint(tokenizer if encoder is None else encoder),
        "sample_hz": sample_hz,
        "frames_per_second": sample_hz / hop_samples,
        "num_train_clips": len(clips.train),
        "num_test_clips": len(clips.test),
    }
    title = f"Linear probes of {command.encoder}: accuracy on held-out clips in %, with 95% intervals over clips"
    _report(command.out, title, settings, metrics, probe_table(metrics))


def _open_encoder(command: EvaluateSemantic) -> tuple[Any, Any]:
    """Return (encoder, None) or (encoder, tokenizer); the encoder is None for a tokenizer without layers."""
    from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
    from audiolm_pytorch.semantic.pretrained import open_encoder

    device, source = device_named(command.device), command.source_of(command.encoder)
    try:
        tokenizer = SemanticTokenizer.from_pretrained(**source, device=device)
    except ValueError:  # not a saved tokenizer; if it is no encoder either, open_encoder reports what is wrong
        return open_encoder(**source).to(device), None
    encoder = getattr(tokenizer, "encoder", None)
    return encoder if isinstance(encoder, FrameEncoder) else None, tokenizer


def _evaluate_mulan(command: EvaluateMuLaN) -> None:
    from audiolm_pytorch.saving.fingerprint import fingerprint_of
    from musiclm_pytorch.evaluation.plots import plot_similarities
    from musiclm_pytorch.evaluation.report import markdown_table
    from musiclm_pytorch.evaluation.tagging import tag_labels
    from musiclm_pytorch.mulan import evaluation
    from musiclm_pytorch.mulan.joint import JointEmbedding

    check_at_least(command, limit=1)
    mulan = JointEmbedding.from_pretrained(**command.source_of(command.model), device=device_named(command.device))
    items = evaluation.held_out_items(command.data, command.limit, command.seed)
    labels = list(tag_labels(items))
    if command.label is not None and command.label not in labels:
        raise ValueError(f"--label must be one of {', '.join(labels) or 'none'}, got {command.label}")
    clips = evaluation.embed_clips(mulan, items, _announce)
    _announce("computing metrics")
    metrics = evaluation.joint_embedding_metrics(clips)
    settings = {
        "command": _command_line("mulan", command),
        "fingerprint": fingerprint_of(mulan),
        "sample_hz": mulan.sample_hz,
        "num_clips": len(items),
        "num_texts": len(clips.texts),
        "texts": "captions" if clips.are_captions else f"prompts of {labels[0]}",
        "prompts": {test.label: dict(zip(test.values, test.prompts)) for test in clips.tests},
    }
    cosines, text_classes, clip_classes = evaluation.ordered_similarities(clips, command.label)
    title = f"{command.model} on {command.data}"
    _report(command.out, f"Joint embedding {title}", settings, metrics, markdown_table(metrics))
    _draw(plot_similarities, cosines, text_classes, clip_classes, command.out / command.plot_file, title)


def _evaluate_music(command: EvaluateMusic) -> None:
    from musiclm_pytorch.cli.evaluate_music import measured_sets
    from musiclm_pytorch.evaluation.music import comparison_table
    from musiclm_pytorch.evaluation.plots import plot_metrics

    check_at_least(command, limit=1, num_samples=1)
    check_seconds(command.seconds)
    check_needs(command, {"musiccaps": "real", "codec": "real", "tokenizer": "training"})
    check_needs(command, {"captions": "model", "num_samples": "model"})
    values, settings = measured_sets(command, device_named(command.device), _announce)
    settings = {"command": _command_line("music", command), **settings}
    _report(command.out, "Generated music", settings, values, comparison_table(values))
    _draw(plot_metrics, values, command.out / command.plot_file)


def _draw(plot: Callable[..., None], *arguments: Any) -> None:
    """Draw the picture of a report; without matplotlib, only warn."""
    try:
        plot(*arguments)
    except ImportError as error:
        logger.warning("the report has no picture; %s", error)


def _report(out: Path, title: str, settings: dict[str, Any], metrics: list[Any], table: str) -> None:
    """Write a report of the metrics as .json and .md files, and print the text of the .md file."""
    from musiclm_pytorch.evaluation.report import write_report

    lines = [f"- {name}: {printable(value)}\n" for name, value in settings.items()]
    text = f"# {printable(title)}\n\n{''.join(lines)}\n{table}"
    path = out / _REPORT_FILE
    write_report(path, metrics, settings, text)
    print(f"{text}\nwrote {printable(path)} and {printable(path.with_suffix('.md'))}")
