"""Metrics of a MusicLM: how well generated music agrees with its captions, and how new the generated music is.

Run as `python -m musiclm_pytorch.recipes.metrics.model_metrics --model DIR --data TUNES --out metrics.json`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor

from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.clips import load_clips
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, evaluate, extract, extract_waves
from musiclm_pytorch.evaluation.metrics.adherence import AttributeFeatures, LabelAdherence
from musiclm_pytorch.evaluation.music import comparison_table, music_metrics
from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor, bundled_musicnn
from musiclm_pytorch.evaluation.report import MetricValue, write_report
from musiclm_pytorch.recipes.metrics.generation_metrics import (
    ATTRIBUTES,
    code_agreement_metrics,
    from_audio,
    from_captions,
    other_clips,
    reconstruct,
)

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["CaptionedClips", "Settings", "main", "measure"]

logger = logger_named(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings for generating the clips on which a MusicLM is measured."""

    seconds: float = 5.0
    """Length of clips and generations (seconds)."""
    num_samples: int = 4
    """Candidates per caption (N)."""
    seed: int = 0
    """Seed of the first candidate."""
    batch_size: int = 16
    """Clips or candidates per batch."""


@dataclass(frozen=True)
class CaptionedClips:
    """Real music clips, with training clips and with held-out clips that have captions."""

    name: str
    train: list[AudioItem]
    valid: list[AudioItem]

    @classmethod
    def load(cls, name: str, folder: Path, limit: int | None = None) -> "CaptionedClips":
        """Read the manifest `train.jsonl`, and at most `limit` clips with captions in the manifest `valid.jsonl`."""
        valid = [item for item in load_items(folder / "valid.jsonl").items if item.caption][:limit]
        if len(valid) < 2:
            raise ValueError(f"{folder / 'valid.jsonl'} must list at least 2 clips with captions, got {len(valid)}")
        return cls(name, load_items(folder / "train.jsonl").items, valid)

    @property
    def captions(self) -> list[str]:
        """Captions of the held-out clips, one per clip."""
        return [item.caption or "" for item in self.valid]

    def real(self, extractors: Sequence[Extractor], seconds: float) -> ClipSet:
        """Return the held-out clips with their features."""
        return ClipSet(f"{self.name}, real", self.valid, extract(self.valid, extractors, seconds))

    def generated(self, name: str, waves: Tensor, sample_hz: int, extractors: Sequence[Extractor]) -> ClipSet:
        """Return waves `[b, n]`, one per held-out clip, with their features."""
        features = extract_waves(waves, sample_hz, extractors)
        return ClipSet(f"{self.name}, {name}", self.valid, features, list(range(len(self.valid))))


@torch.no_grad()
def measure(
    model: "MusicLM",
    classifier: AttributeClassifier,
    clips: CaptionedClips,
    settings: Settings,
    musicnn: MusicNNExtractor | None = None,
) -> list[MetricValue]:
    """Measure a MusicLM on one set of clips, with a classifier that is fitted to real clips.

    The names of the sets in the values begin with the name of the clips.
    """
    mulan = JointEmbedder(model.mulan_embed_quantizer.mulan, "MuLan")
    metrics = music_metrics(joint=[mulan], musicnn=musicnn, classifier=classifier)
    extractors = [metric.extractor for metric in metrics]
    users = [metric.extractor for metric in metrics if metric.uses_training]
    real = clips.real(extractors, settings.seconds)
    training = ClipSet("training", clips.train, extract(clips.train, users, settings.seconds))
    sets = [
        clips.generated(name, waves, model.sample_hz, extractors)
        for name, waves in _conditions(model, clips, settings).items()
    ]
    values, left_out = evaluate(metrics, sets, real, training)
    for name, reason in left_out.items():
        logger.warning("%s: %s", name, reason)
    labels = LabelAdherence(AttributeFeatures(classifier))
    best = sets[-1]
    other = [clips.valid[index] for index in other_clips(len(clips.valid))]
    controls = [replace(best, name=f"{best.name}, shuffled captions (must be chance)", items=other)]
    unseen = [index for index, item in enumerate(clips.valid) if item.labels.get("held_out_pair") is True]
    if unseen:
        controls += [part.select(unseen, f"{part.name}, pairs unseen in training") for part in (real, *sets)]
    return [*values, *evaluate([labels], controls)[0], *_code_agreement(model, mulan, clips, real)]


def _conditions(model: "MusicLM", clips: CaptionedClips, settings: Settings) -> dict[str, Tensor]:
    """Return the waves `[b, n]` of every condition; the last one are the best candidates for the captions."""
    waves = load_clips(clips.valid, model.sample_hz, settings.seconds)
    logger.info("%s: generating from %d real clips", clips.name, len(waves))
    from_real = from_audio(model, waves, model.sample_hz, settings.seconds, settings.seed, settings.batch_size)
    logger.info("%s: generating from %d captions, %d candidates each", clips.name, len(waves), settings.num_samples)
    generations = from_captions(
        model, clips.captions, settings.seconds, settings.num_samples, settings.seed, settings.batch_size
    )
    return {
        "codec copies": reconstruct(model.audio_lm.codec, waves, settings.batch_size),
        "from audio, N = 1": from_real,
        "from captions, N = 1": generations.first,
        f"from captions, N = {settings.num_samples}": generations.best,
    }


def _code_agreement(model: "MusicLM", mulan: JointEmbedder, clips: CaptionedClips, real: ClipSet) -> list[MetricValue]:
    """Measure how often the MuLaN codes of captions and clips agree."""
    quantizer = model.mulan_embed_quantizer
    audio = quantizer.codes_from_latents(torch.stack(real.of(mulan)), "audio")
    text = quantizer.codes_from_latents(mulan.texts(clips.captions), "text")
    return code_agreement_metrics(f"MuLan codes of text and audio agree / {real.name}", audio, text)


def main(
    model: str,
    data: Path,
    corpus: Path | None = None,
    out: Path = Path("metrics.json"),
    classifier: Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),
) -> None:
    """Measure a MusicLM, and write the metrics as JSON and as a Markdown table.

    Args:
        model: Folder of a MusicLM, or name of a bundled MusicLM.
        data: Folder of real clips with the manifests train.jsonl and valid.jsonl, on which the model is measured.
        corpus: Folder of the clips on which the model was trained, for a second measurement.
        out: JSON file for the metrics; the table is written to a file with the suffix .md.
        classifier: Folder of a fitted classifier; if the folder is empty, a classifier is fitted to the training clips.
        limit: Largest number of held-out clips to use; None = all clips.
        device: Device on which the model runs.
        settings: Length, number of candidates and seed of generated clips.
    """
    from musiclm_pytorch.musiclm import MusicLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = MusicLM.from_pretrained(model, device=device)
    fitted = fitted_classifier(data / "train.jsonl", ATTRIBUTES, classifier)
    folders = {"tunes": data} | ({"corpus": corpus} if corpus is not None else {})
    report_settings: dict[str, Any] = {
        "model": model,
        "model_fingerprint": fingerprint_of(musiclm),
        "classifier_fingerprint": fingerprint_of(fitted),
        "limit": limit,
        **asdict(settings),
    }
    musicnn = MusicNNExtractor(bundled_musicnn().to(device))
    metrics: list[MetricValue] = []
    for name, folder in folders.items():
        metrics += measure(musiclm, fitted, CaptionedClips.load(name, folder, limit), settings, musicnn)
        # Written after each set, since generation takes long.
        write_report(out, metrics, report_settings, comparison_table(metrics))
    sys.stdout.write(comparison_table(metrics))


if __name__ == "__main__":
    tyro.cli(main)
