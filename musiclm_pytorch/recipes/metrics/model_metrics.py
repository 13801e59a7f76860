"""The metrics of a MusicLM: what it does with real audio and with captions, beside chance and beside real music.

Run as `python -m musiclm_pytorch.recipes.metrics.model_metrics --model DIR --data TUNES --out metrics.json`.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor

from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from musiclm_pytorch.evaluation.novelty import (
    melody_similarity,
    melody_spectrogram,
    nearest_similarity,
    novelty_metrics,
)
from musiclm_pytorch.evaluation.report import Metric, markdown_table, write_report
from musiclm_pytorch.evaluation.retrieval import relevance_of, retrieval
from musiclm_pytorch.recipes.metrics.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.recipes.metrics.clips import labels_of, load_clips
from musiclm_pytorch.recipes.metrics.generation_metrics import (
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

CLIPS_AT_ONCE = 200


@dataclass(frozen=True)
class Settings:
    """How metrics are measured."""

    seconds: float = 5.0
    """Length of clips and generations (seconds)."""
    num_samples: int = 4
    """Candidates per caption (N)."""
    seed: int = 0
    """Seed of the first candidate."""
    batch: int = 16
    """Clips or candidates at once."""


@dataclass(frozen=True)
class ClipSet:
    """Real music to measure against: what was there for training, and captioned clips that were held out."""

    name: str
    train: list[AudioItem]
    valid: list[AudioItem]

    @classmethod
    def load(cls, name: str, folder: Path, limit: int | None = None) -> "ClipSet":
        """Read the manifests `train.jsonl` and `valid.jsonl` of a folder.

        Args:
            name: How metrics call it.
            folder: Where the manifests lie.
            limit: Use only so many held-out clips, the first ones.

        Returns:
            The clips that have captions.

        Raises:
            ValueError: If a manifest is missing or no held-out clip has a caption.
        """
        valid = [item for item in load_items(folder / "valid.jsonl").items if item.caption][:limit]
        if len(valid) < 2:
            raise ValueError(f"{folder / 'valid.jsonl'}: need at least 2 clips with captions, got {len(valid)}")
        return cls(name, load_items(folder / "train.jsonl").items, valid)

    @property
    def captions(self) -> list[str]:
        """Caption of each held-out clip."""
        return [item.caption or "" for item in self.valid]

    def truth(self, judge: AttributeClassifier) -> dict[str, list[str]]:
        """Labels of the held-out clips, for the attributes whose every value the judge knows."""
        truth = {name: labels_of(self.valid, name) for name in judge.classes}
        unknown = [name for name, names in truth.items() if set(names) - set(judge.classes[name])]
        if unknown:
            logger.warning("%s: the judge does not know all values of %s; left out", self.name, unknown)
        return {name: names for name, names in truth.items() if name not in unknown}


@torch.no_grad()
def measure(model: "MusicLM", judge: AttributeClassifier, clips: ClipSet, settings: Settings) -> list[Metric]:
    """Measure everything about a model on one set of clips.

    Args:
        model: The MusicLM.
        judge: Fitted on real training clips.
        clips: Real music.
        settings: Lengths, candidates, seeds.

    Returns:
        All metrics, in the order of a report.
    """
    waves = load_clips(clips.valid, model.sample_hz, settings.seconds)
    logger.info("%s: generating from %d real clips", clips.name, len(waves))
    echoes = from_audio(model, waves, model.sample_hz, settings.seconds, settings.seed, settings.batch)
    logger.info("%s: generating from %d captions, %d candidates each", clips.name, len(waves), settings.num_samples)
    songs = from_captions(model, clips.captions, settings.seconds, settings.num_samples, settings.seed, settings.batch)
    conditions = {
        "real held-out": waves,
        "codec reconstruction": reconstruct(model.audio_lm.codec, waves, settings.batch),
        "generated from audio (N = 1)": echoes,
        f"generated from captions (N = {settings.num_samples})": songs.best,
        "generated from captions (N = 1)": songs.first,
    }
    logger.info("%s: attributes, retrieval, codes and novelty", clips.name)
    return [
        *_attributes(judge, clips, conditions, model.sample_hz),
        *_shuffled(judge, clips, songs.best, model.sample_hz),
        *_retrieval_and_codes(model, clips, waves),
        *_novelty(model, judge, clips, waves, songs.best),
    ]


def _attributes(
    judge: AttributeClassifier, clips: ClipSet, conditions: dict[str, Tensor], sample_hz: int
) -> list[Metric]:
    """Attributes of all held-out clips, and of those whose pair of attributes no training clip has."""
    truth = clips.truth(judge)
    metrics = []
    for condition, waves in conditions.items():
        metrics += attribute_metrics(f"{clips.name} / {condition}", judge, waves, sample_hz, truth)
    unseen = [index for index, item in enumerate(clips.valid) if item.labels.get("held_out_pair") is True]
    if unseen:
        rows = {name: [names[index] for index in unseen] for name, names in truth.items()}
        for condition, waves in conditions.items():
            name = f"{clips.name}, unseen pairs / {condition}"
            metrics += attribute_metrics(name, judge, waves[unseen], sample_hz, rows)
    return metrics


def _shuffled(judge: AttributeClassifier, clips: ClipSet, songs: Tensor, sample_hz: int) -> list[Metric]:
    """The control: each generation beside the attributes of another caption."""
    others = other_clips(len(clips.valid))
    truth = {name: [names[other] for other in others] for name, names in clips.truth(judge).items()}
    return attribute_metrics(f"{clips.name} / shuffled captions", judge, songs, sample_hz, truth, note="must be chance")


def _retrieval_and_codes(model: "MusicLM", clips: ClipSet, waves: Tensor) -> list[Metric]:
    """How well MuLaN and its codes join captions and clips."""
    quantizer = model.mulan_embed_quantizer
    audio = audio_latents(quantizer, waves, model.sample_hz)
    text = text_latents(quantizer, clips.captions)
    found = retrieval(text @ audio.T, relevance_of(clips.captions))
    audio_codes = quantizer.codes_from_latents(audio, "audio")
    text_codes = quantizer.codes_from_latents(text, "text")
    return [
        *found.metrics(f"{clips.name} / MuLaN text to audio"),
        *code_agreement_metrics(f"{clips.name} / text and audio codes agree", audio_codes, text_codes),
    ]


def _novelty(
    model: "MusicLM", judge: AttributeClassifier, clips: ClipSet, waves: Tensor, songs: Tensor
) -> list[Metric]:
    """Nearness of generations and of real held-out clips to the training clips, in three embeddings."""
    rate_hz, quantizer = model.sample_hz, model.mulan_embed_quantizer
    kinds: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
        "MuLaN": (lambda batch: audio_latents(quantizer, batch, rate_hz), nearest_similarity),
        "log-mel statistics": (lambda batch: judge.describe(batch, rate_hz), nearest_similarity),
        "melody": (lambda batch: melody_spectrogram(batch, rate_hz), melody_similarity),
    }
    seconds = waves.shape[-1] / rate_hz
    references: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for first in range(0, len(clips.train), CLIPS_AT_ONCE):
        batch = load_clips(clips.train[first : first + CLIPS_AT_ONCE], rate_hz, seconds)
        for kind, (embed, _) in kinds.items():
            references[kind].append(embed(batch))
    metrics = []
    for kind, (embed, nearest) in kinds.items():
        training = torch.cat(references[kind])
        generated, held_out = nearest(embed(songs), training), nearest(embed(waves), training)
        metrics += novelty_metrics(f"{clips.name} / nearest training clip, {kind}", generated, held_out)
    return metrics


def main(
    model: str,
    data: Path = Path("../shared/data/tunes"),
    corpus: Path | None = None,
    out: Path = Path("metrics.json"),
    classifier: Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),
) -> None:
    """Measure a MusicLM and write the metrics as JSON and as a table.

    Args:
        model: Folder of a model, or the name of a bundled one.
        data: Folder of real clips with train.jsonl and valid.jsonl; the judge is fitted on its training clips.
        corpus: Folder of the clips that the model was trained on, to be measured against as well.
        out: File to write; the table goes beside it with the suffix .md.
        classifier: Folder of a fitted judge; made there if it is missing.
        limit: Use only so many held-out clips, for a quick look.
        device: Where the model runs.
        settings: Lengths, candidates, seeds.
    """
    from musiclm_pytorch.pretrained.model_folder import load_musiclm

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = load_musiclm(model, device)
    judge = fitted_classifier(data, classifier)
    folders = {"tunes": data} | ({"corpus": corpus} if corpus is not None else {})
    described: dict[str, Any] = {
        "model": model,
        "model_fingerprint": fingerprint_of(musiclm),
        "judge_fingerprint": fingerprint_of(judge),
        "limit": limit,
        **asdict(settings),
    }
    metrics: list[Metric] = []
    for name, folder in folders.items():
        metrics += measure(musiclm, judge, ClipSet.load(name, folder, limit), settings)
        # After each set: generating takes long, and what is measured shall not be lost.
        write_report(out, metrics, described)
    sys.stdout.write(markdown_table(metrics))


if __name__ == "__main__":
    tyro.cli(main)
