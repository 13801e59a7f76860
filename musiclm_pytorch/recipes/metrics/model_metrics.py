"""Metrics of a MusicLM: how well generated music agrees with its captions, and how new the generated music is.

Run as `python -m musiclm_pytorch.recipes.metrics.model_metrics --model DIR --data TUNES --out metrics.json`.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from musiclm_pytorch.evaluation.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet as Clips, Extractor, evaluate, extract
from musiclm_pytorch.evaluation.metrics.adherence import AttributeFeatures
from musiclm_pytorch.evaluation.metrics.novelty import MelodySpectrogram, Novelty
from musiclm_pytorch.evaluation.report import MetricValue, markdown_table, write_report
from musiclm_pytorch.evaluation.retrieval import retrieval
from musiclm_pytorch.recipes.metrics.generation_metrics import (
    ATTRIBUTES,
    attribute_metrics,
    audio_latents,
    code_agreement_metrics,
    from_audio,
    from_captions,
    other_clips,
    reconstruct,
    text_latents,
)

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["ClipSet", "Settings", "main", "measure"]

logger = logging.getLogger(__name__)


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
class ClipSet:
    """Set of real music clips, with training clips and with held-out clips that have captions."""

    name: str
    train: list[AudioItem]
    valid: list[AudioItem]

    @classmethod
    def load(cls, name: str, folder: Path, limit: int | None = None) -> "ClipSet":
        """Read the manifest `train.jsonl`, and at most `limit` clips with captions in the manifest `valid.jsonl`."""
        valid = [item for item in load_items(folder / "valid.jsonl").items if item.caption][:limit]
        if len(valid) < 2:
            raise ValueError(f"{folder / 'valid.jsonl'} must list at least 2 clips with captions, got {len(valid)}")
        return cls(name, load_items(folder / "train.jsonl").items, valid)

    @property
    def captions(self) -> list[str]:
        """Captions of the held-out clips, one per clip."""
        return [item.caption or "" for item in self.valid]

    def truth(self, classifier: AttributeClassifier) -> dict[str, list[str]]:
        """Return the labels of the held-out clips, for attributes of which every value is a class of `classifier`."""
        truth = {name: labels_of(self.valid, name) for name in classifier.classes}
        unknown = [name for name, names in truth.items() if set(names) - set(classifier.classes[name])]
        if unknown:
            logger.warning(
                "%s: the classifier does not know all values of %s; these attributes are left out", self.name, unknown
            )
        return {name: names for name, names in truth.items() if name not in unknown}


@torch.no_grad()
def measure(model: "MusicLM", classifier: AttributeClassifier, clips: ClipSet, settings: Settings) -> list[MetricValue]:
    """Measure a MusicLM on one set of clips, with a classifier that is fitted to real clips."""
    waves = load_clips(clips.valid, model.sample_hz, settings.seconds)
    logger.info("%s: generating from %d real clips", clips.name, len(waves))
    from_real = from_audio(model, waves, model.sample_hz, settings.seconds, settings.seed, settings.batch_size)
    logger.info("%s: generating from %d captions, %d candidates each", clips.name, len(waves), settings.num_samples)
    generations = from_captions(
        model, clips.captions, settings.seconds, settings.num_samples, settings.seed, settings.batch_size
    )
    conditions = {
        "real held-out": waves,
        "codec reconstruction": reconstruct(model.audio_lm.codec, waves, settings.batch_size),
        "generated from audio (N = 1)": from_real,
        f"generated from captions (N = {settings.num_samples})": generations.best,
        "generated from captions (N = 1)": generations.first,
    }
    logger.info("%s: attributes, retrieval, codes and novelty", clips.name)
    return [
        *_attributes(classifier, clips, conditions, model.sample_hz),
        *_shuffled(classifier, clips, generations.best, model.sample_hz),
        *_retrieval_and_codes(model, clips, waves),
        *_novelty(model, classifier, clips, waves, generations.best),
    ]


def _attributes(
    classifier: AttributeClassifier, clips: ClipSet, conditions: dict[str, Tensor], sample_hz: int
) -> list[MetricValue]:
    """Measure attributes of generated clips, for all held-out captions and for attribute pairs unseen in training."""
    truth = clips.truth(classifier)
    metrics = []
    for condition, waves in conditions.items():
        metrics += attribute_metrics(f"{clips.name} / {condition}", classifier, waves, sample_hz, truth)
    unseen = [index for index, item in enumerate(clips.valid) if item.labels.get("held_out_pair") is True]
    if unseen:
        rows = {name: [names[index] for index in unseen] for name, names in truth.items()}
        for condition, waves in conditions.items():
            name = f"{clips.name}, unseen pairs / {condition}"
            metrics += attribute_metrics(name, classifier, waves[unseen], sample_hz, rows)
    return metrics


def _shuffled(
    classifier: AttributeClassifier, clips: ClipSet, generations: Tensor, sample_hz: int
) -> list[MetricValue]:
    """Compare each generated clip with the attributes of another caption, as a control experiment."""
    other = other_clips(len(clips.valid))
    truth = {name: [names[index] for index in other] for name, names in clips.truth(classifier).items()}
    return attribute_metrics(
        f"{clips.name} / shuffled captions", classifier, generations, sample_hz, truth, note="must be chance"
    )


def _retrieval_and_codes(model: "MusicLM", clips: ClipSet, waves: Tensor) -> list[MetricValue]:
    """Measure how well MuLaN finds clips by their captions, and how often MuLaN codes of captions and clips agree."""
    quantizer = model.mulan_embed_quantizer
    audio = audio_latents(quantizer, waves, model.sample_hz)
    text = text_latents(quantizer, clips.captions)
    # Equal captions describe each other's clips.
    relevant = torch.tensor([[caption == other for other in clips.captions] for caption in clips.captions])
    ranked = retrieval(text @ audio.T, relevant)
    audio_codes = quantizer.codes_from_latents(audio, "audio")
    text_codes = quantizer.codes_from_latents(text, "text")
    return [
        *ranked.metrics(f"{clips.name} / MuLaN text to audio"),
        *code_agreement_metrics(f"{clips.name} / text and audio codes agree", audio_codes, text_codes),
    ]


def _novelty(
    model: "MusicLM", classifier: AttributeClassifier, clips: ClipSet, waves: Tensor, generations: Tensor
) -> list[MetricValue]:
    """Measure how similar generated clips and held-out clips are to the nearest training clip, in three embeddings."""
    mulan = JointEmbedder(model.mulan_embed_quantizer.mulan, "MuLan")
    embedders: list[Extractor] = [mulan, AttributeFeatures(classifier), MelodySpectrogram()]
    seconds = waves.shape[-1] / model.sample_hz
    real = Clips(f"{clips.name}, real held-out", clips.valid, extract(clips.valid, embedders, seconds))
    training = Clips("training", clips.train, extract(clips.train, embedders, seconds))
    features = {e.name: list(e(resample(generations, model.sample_hz, e.sample_hz))) for e in embedders}
    generated = Clips(f"{clips.name}, generated", clips.valid, features)
    return evaluate([Novelty(embedder) for embedder in embedders], [generated], real, training)[0]


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
    from musiclm_pytorch.pretrained.model_folder import load_musiclm

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = load_musiclm(model, device)
    fitted = fitted_classifier(data / "train.jsonl", ATTRIBUTES, classifier)
    folders = {"tunes": data} | ({"corpus": corpus} if corpus is not None else {})
    report_settings: dict[str, Any] = {
        "model": model,
        "model_fingerprint": fingerprint_of(musiclm),
        "classifier_fingerprint": fingerprint_of(fitted),
        "limit": limit,
        **asdict(settings),
    }
    metrics: list[MetricValue] = []
    for name, folder in folders.items():
        metrics += measure(musiclm, fitted, ClipSet.load(name, folder, limit), settings)
        # Written after each set, since generation takes long.
        write_report(out, metrics, report_settings)
    sys.stdout.write(markdown_table(metrics))


if __name__ == "__main__":
    tyro.cli(main)
