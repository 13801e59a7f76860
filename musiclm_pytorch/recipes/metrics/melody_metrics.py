"""Metrics of a MusicLM with melodies: whether music follows a melody, and still has the instrument of its text.

Run as `python -m musiclm_pytorch.recipes.metrics.melody_metrics --model DIR --data TUNES --out melody.json`.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

__all__ = ["Generate", "Settings", "main", "measure", "unseen_melodies"]

logger = logger_named(__name__)

# Returns one wave `[b, n]` per text, for texts and melodies `[b, n]`, or for texts alone.
Generate = Callable[[list[str], Tensor | None], Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings for the melodies, and for the music that is generated with them."""

    count: int = 60
    """Number of melodies."""
    melody_seed: int = 1000
    """Seed of the melodies; the training corpus has another seed."""
    soundfont: str = "Csound GM"
    """Timbres of the melodies; the default is never used in training."""
    seconds: float = 5.0
    """Length of melodies and generations (seconds)."""
    num_samples: int = 1
    """Candidates per text of a MusicLM; MuLan ranks them by the text."""
    seed: int = 0
    """Seed of the first candidate of a MusicLM, and of the first text of a MusicGen."""
    batch_size: int = 12
    """Texts per batch."""


def unseen_melodies(settings: Settings) -> Tensor:
    """Render melodies `[k, n]` at `SAMPLE_HZ`."""
    options: dict[str, Any] = {"seed": settings.melody_seed, "seconds": settings.seconds}
    clips = render_melodies(settings.count, soundfont=settings.soundfont, **options)
    return torch.stack([torch.from_numpy(wave) for wave, _ in clips])


@torch.no_grad()
def measure(
    generate: Generate,
    sample_hz: int,
    classifier: AttributeClassifier,
    melodies: Tensor,
    melody_hz: int,
    batch_size: int = 12,
) -> list[MetricValue]:
    """Generate music with each of the melodies `[k, n]`, with another one, and without, and compare it with the melody.

    `generate` returns waves at `sample_hz`. The texts name an instrument, which the classifier must find.
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
        parts: list[Tensor] = []
        for first in range(0, len(texts), batch_size):
            rows = slice(first, first + batch_size)
            parts += generate(texts[rows], None if selected is None else selected[rows]).float().cpu()
        waves = torch.stack([peak_safe(wave) for wave in parts])
        features = extract_waves(waves, sample_hz, [chroma.extractor, labels.extractor])
        clips = ClipSet(name, items, features, list(range(len(items))))
        values += [*chroma.measure(clips, real, None), *labels.measure(clips, None, None)]
    return values


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

    def generate(texts: list[str], melodies: Tensor | None) -> Tensor:
        melody = {} if melodies is None else {"melody": melodies, "melody_sample_hz": SAMPLE_HZ}
        request: dict[str, Any] = {"seconds": settings.seconds, "num_samples": settings.num_samples, **melody}
        return musiclm(texts, seed=settings.seed, **request)

    melodies = unseen_melodies(settings)
    metrics = measure(generate, musiclm.sample_hz, fitted, melodies, SAMPLE_HZ, settings.batch_size)
    table = comparison_table(metrics)
    write_report(
        out, metrics, {"model": model, "model_fingerprint": fingerprint_of(musiclm), **asdict(settings)}, table
    )
    sys.stdout.write(table)


if __name__ == "__main__":
    tyro.cli(main)
