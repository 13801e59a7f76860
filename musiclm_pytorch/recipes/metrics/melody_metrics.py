"""Metrics of a MusicLM with melodies: whether music follows a melody, and still has the instrument of its text.

Run as `python -m musiclm_pytorch.recipes.metrics.melody_metrics --model DIR --data TUNES --out melody.json`.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe
from audiolm_pytorch.data.items import AudioItem
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.metric import ClipSet, extract_waves
from musiclm_pytorch.evaluation.metrics.adherence import AttributeFeatures, LabelAdherence
from musiclm_pytorch.evaluation.metrics.chroma import ChromaSimilarity
from musiclm_pytorch.evaluation.music import comparison_table
from musiclm_pytorch.evaluation.report import MetricValue, write_report
from musiclm_pytorch.recipes.corpus.instruments import INSTRUMENTS
from musiclm_pytorch.recipes.corpus.melodies import render_melodies
from musiclm_pytorch.recipes.corpus.planning import SAMPLE_HZ
from musiclm_pytorch.recipes.metrics.generation_metrics import other_clips

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["Settings", "main", "measure"]

logger = logger_named(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings for generating the music on which a MusicLM is measured."""

    count: int = 60
    """Number of melodies."""
    melody_seed: int = 1000
    """Seed of the melodies; the training corpus has another seed."""
    soundfont: str = "Csound GM"
    """Timbres of the melodies; the default is never used in training."""
    seconds: float = 5.0
    """Length of melodies and generations (seconds)."""
    num_samples: int = 1
    """Candidates per text; MuLan ranks them by the text."""
    seed: int = 0
    """Seed of the first candidate."""
    batch_size: int = 12
    """Texts per batch."""


@torch.no_grad()
def measure(
    model: "MusicLM", classifier: AttributeClassifier, melodies: Tensor, melody_hz: int, settings: Settings
) -> list[MetricValue]:
    """Generate music with each of the melodies `[k, n]`, with another one, and without, and compare it with the melody.

    The texts name an instrument, which the classifier must find.
    """
    instruments = [name for name in classifier.classes["instrument"] if name in INSTRUMENTS]
    asked = [instruments[index % len(instruments)] for index in range(len(melodies))]
    items = [AudioItem(Path(f"{name} {number}"), None, {"instrument": name}, 1, 1) for number, name in enumerate(asked)]
    texts = [f"a folk tune played on the {name}, unaccompanied" for name in asked]
    chroma, labels = ChromaSimilarity(), LabelAdherence(AttributeFeatures(classifier))
    real = ClipSet("melodies", items, extract_waves(melodies, melody_hz, [chroma.extractor]))
    values: list[MetricValue] = []
    choices = {
        "with the melody": melodies,
        "with another melody": melodies[other_clips(len(melodies))],
        "text alone": None,
    }
    for name, selected in choices.items():
        logger.info("generating %s", name)
        waves = _generate(model, texts, selected, melody_hz, settings)
        features = extract_waves(waves, model.sample_hz, [chroma.extractor, labels.extractor])
        clips = ClipSet(name, items, features, list(range(len(items))))
        values += [*chroma.measure(clips, real, None), *labels.measure(clips, None, None)]
    return values


def _generate(
    model: "MusicLM", texts: list[str], melodies: Tensor | None, melody_hz: int, settings: Settings
) -> Tensor:
    """Generate one wave `[b, n]` for each text."""
    parts = []
    for first in range(0, len(texts), settings.batch_size):
        rows = slice(first, first + settings.batch_size)
        request: dict[str, Any] = {"seconds": settings.seconds, "num_samples": settings.num_samples}
        if melodies is not None:
            request |= {"melody": melodies[rows], "melody_sample_hz": melody_hz}
        parts.append(model(texts[rows], seed=settings.seed, **request).float().cpu())
    return torch.stack([peak_safe(wave) for wave in torch.cat(parts)])


def main(
    model: str,
    data: Path,
    out: Path = Path("melody.json"),
    classifier: Path | None = None,
    device: str = "cpu",
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),
) -> None:
    """Measure how well a MusicLM follows unseen melodies in unseen timbres; write and print a table.

    Args:
        model: Folder of a MusicLM with a melody embedder.
        data: Folder of real clips with the manifest train.jsonl, to which the classifier of instruments is fitted.
        out: JSON file for the metrics; the table is written to a file with the suffix .md.
        classifier: Folder of a fitted classifier; if the folder is empty, the classifier is saved there.
        device: Device on which the model runs.
        settings: Melodies, length, number of candidates and seed of the generated music.
    """
    from musiclm_pytorch.musiclm import MusicLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = MusicLM.from_pretrained(model, device=device)
    fitted = fitted_classifier(data / "train.jsonl", ("instrument",), classifier)
    options: dict[str, Any] = {"seed": settings.melody_seed, "seconds": settings.seconds}
    clips = render_melodies(settings.count, soundfont=settings.soundfont, **options)
    melodies = torch.stack([torch.from_numpy(wave) for wave, _ in clips])
    metrics = measure(musiclm, fitted, melodies, SAMPLE_HZ, settings)
    table = comparison_table(metrics)
    write_report(
        out, metrics, {"model": model, "model_fingerprint": fingerprint_of(musiclm), **asdict(settings)}, table
    )
    sys.stdout.write(table)


if __name__ == "__main__":
    tyro.cli(main)
