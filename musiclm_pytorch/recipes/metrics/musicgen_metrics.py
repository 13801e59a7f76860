"""Metrics of a MusicGen: how well music follows melodies and captions, beside the music of a MusicLM.

Run as `python -m musiclm_pytorch.recipes.metrics.musicgen_metrics --model DIR --data TUNES --out musicgen.json`.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor

from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.clips import load_clips
from musiclm_pytorch.evaluation.metric import Extractor, Metric, evaluate
from musiclm_pytorch.evaluation.metrics.adherence import AttributeFeatures, LabelAdherence
from musiclm_pytorch.evaluation.metrics.frechet import FrechetDistance
from musiclm_pytorch.evaluation.metrics.kernel import KernelDistance
from musiclm_pytorch.evaluation.music import comparison_table
from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor, bundled_musicnn
from musiclm_pytorch.evaluation.report import MetricValue, write_report
from musiclm_pytorch.recipes.corpus.planning import SAMPLE_HZ
from musiclm_pytorch.recipes.metrics import melody_metrics
from musiclm_pytorch.recipes.metrics.generation_metrics import ATTRIBUTES, from_captions, reconstruct
from musiclm_pytorch.recipes.metrics.model_metrics import CaptionedClips

if TYPE_CHECKING:
    from musiclm_pytorch.musicgen.musicgen import MusicGen
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["Settings", "main", "measure_captions", "measure_melodies"]

logger = logger_named(__name__)


@dataclass(frozen=True)
class Settings(melody_metrics.Settings):
    """Settings for generating the music on which a MusicGen is measured."""

    temperature: float = 1.0
    """Divisor of the logits of the MusicGen."""
    top_k: int | None = 250
    """Number of most likely tokens to sample from; None = all tokens."""
    guidance_scale: float = 3.0
    """Scale of classifier-free guidance of the MusicGen."""


def _generate(
    model: "MusicGen", texts: list[str], settings: Settings, melodies: Tensor | None = None, first: int = 0
) -> Tensor:
    """Generate one mono wave `[b, n]` per text; the text i has the seed `settings.seed + first + i`."""
    music = model.generate(
        texts=texts,
        melody=melodies,
        melody_sample_hz=None if melodies is None else SAMPLE_HZ,
        seconds=settings.seconds,
        seeds=settings.seed + first,
        temperature=settings.temperature,
        top_k=settings.top_k,
        guidance_scale=settings.guidance_scale,
    )
    return torch.stack([wave if wave.ndim == 1 else wave.mean(dim=0) for wave in music.waves]).float().cpu()


def measure_melodies(
    model: "MusicGen", classifier: AttributeClassifier, melodies: Tensor, settings: Settings
) -> list[MetricValue]:
    """Measure how well music follows the melodies `[k, n]` at `SAMPLE_HZ`, and texts that name an instrument."""

    def generate(texts: list[str], selected: Tensor | None) -> Tensor:
        return _generate(model, texts, settings, selected)

    return melody_metrics.measure(generate, model.sample_hz, classifier, melodies, SAMPLE_HZ, settings.batch_size)


@torch.no_grad()
def measure_captions(
    model: "MusicGen",
    classifier: AttributeClassifier,
    clips: CaptionedClips,
    settings: Settings,
    embedder: Extractor,
    musiclm: "MusicLM | None" = None,
) -> list[MetricValue]:
    """Measure music of captions, codec copies of the real clips, and music of a MusicLM for the same captions.

    The distances are those of the embeddings of `embedder`.
    """
    metrics: list[Metric] = [FrechetDistance(embedder), KernelDistance(embedder)]
    metrics.append(LabelAdherence(AttributeFeatures(classifier)))
    extractors = [metric.extractor for metric in metrics]
    waves = load_clips(clips.valid, model.sample_hz, settings.seconds)
    num_levels = model.transformer.layout.predicted[0].num_levels
    copies = reconstruct(model.codec, waves, settings.batch_size, num_levels)
    logger.info("%s: generating from %d captions", clips.name, len(waves))
    captions, parts = clips.captions, []
    for first in range(0, len(captions), settings.batch_size):
        parts.append(_generate(model, captions[first : first + settings.batch_size], settings, first=first))
    sets = [
        clips.generated(f"codec copies, {num_levels} levels", copies, model.sample_hz, extractors),
        clips.generated("MusicGen", torch.cat(parts), model.sample_hz, extractors),
    ]
    if musiclm is not None:
        count = settings.num_samples
        music = from_captions(musiclm, captions, settings.seconds, count, settings.seed, settings.batch_size).best
        sets.append(clips.generated(f"MusicLM, N = {count}", music, musiclm.sample_hz, extractors))
    return evaluate(metrics, sets, clips.real(extractors, settings.seconds))[0]


def main(
    model: str,
    data: Path,
    out: Path = Path("musicgen.json"),
    musiclm: str | None = "tiny",
    classifier: Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),
) -> None:
    """Measure a MusicGen with unseen melodies and with captions; write and print two tables.

    Args:
        model: Folder of a MusicGen, or name of a bundled one. Without a melody condition, only captions are measured.
        data: Folder of real clips with the manifests train.jsonl and valid.jsonl.
        out: JSON file for the metrics; the tables are written to a file with the suffix .md.
        musiclm: Folder of a MusicLM to compare with, or name of a bundled one; None = no comparison.
        classifier: Folder of a fitted classifier; if the folder is empty, the classifier is saved there.
        limit: Largest number of held-out clips to use; None = all clips.
        device: Device on which the models run.
        settings: Melodies, length, sampling and seed of the generated music.
    """
    from musiclm_pytorch.musicgen.musicgen import MusicGen
    from musiclm_pytorch.musiclm import MusicLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musicgen = MusicGen.from_pretrained(model, device=device)
    other = None if musiclm is None else MusicLM.from_pretrained(musiclm, device=device)
    fitted = fitted_classifier(data / "train.jsonl", ATTRIBUTES, classifier)
    facts: dict[str, Any] = {"model": model, "model_fingerprint": fingerprint_of(musicgen), "musiclm": musiclm}
    facts |= {"classifier_fingerprint": fingerprint_of(fitted), "limit": limit, **asdict(settings)}
    metrics, tables = list[MetricValue](), list[str]()

    def report(values: list[MetricValue]) -> None:
        metrics.extend(values)
        tables.append(comparison_table(values))
        write_report(out, metrics, facts, "\n".join(tables))  # after each table, since generation takes long

    if musicgen.chroma is not None:
        report(measure_melodies(musicgen, fitted, melody_metrics.unseen_melodies(settings), settings))
    clips = CaptionedClips.load("tunes", data, limit)
    musicnn = MusicNNExtractor(bundled_musicnn().to(device))
    report(measure_captions(musicgen, fitted, clips, settings, musicnn, other))
    sys.stdout.write("\n".join(tables))


if __name__ == "__main__":
    tyro.cli(main)
