"""Metrics of prompts of a MusicLM: stories, long pieces, mixtures, negative texts, and the memory of streams.

Run as `python -m musiclm_pytorch.recipes.metrics.prompts --model tiny --data TUNES --out prompts.json`.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import tyro
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.classifier import FEATURES, AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures, FeatureModule
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.report import MetricValue, markdown_table, write_report
from musiclm_pytorch.generation.prompts import Mixture
from musiclm_pytorch.recipes.memory import peak_bytes_of
from musiclm_pytorch.recipes.metrics.generation_metrics import ATTRIBUTES, reconstruct
from musiclm_pytorch.recipes.metrics.long_pieces import key_metrics, seam_metrics, seams_of, tempo_metrics

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["SecondFeatures", "Settings", "classifier_of_seconds", "main", "mixtures", "negative_text", "stories"]

logger = logger_named(__name__)

_CLIP_SECONDS = 5.0
_LONG_PIECE_SECONDS = 60.0
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CLIPS_PER_BATCH = 50


@dataclass(frozen=True)
class Settings:
    """Numbers of generated pieces."""

    stories: int = 14
    """Stories of two instruments each."""
    change_seconds: float = 15.0
    """Length of each half of a story."""
    long_pieces: int = 8
    """Pieces of 60 s."""
    pairs: int = 14
    """Pairs of instruments that are mixed."""
    seeds: int = 4
    """Clips of 5 s for each mixture, and for each text with and without the negative text."""
    num_samples: int = 1
    """Candidates of stories and long pieces, of which MuLaN selects the best."""
    seed: int = 0
    """Seed of the first candidate."""
    guidance_scale: float | None = None
    """Guidance scale of the semantic and the coarse stage; None = that of the model."""
    text: str = "a fast jig played on the {}"
    """Text of an instrument."""
    batch_size: int = 16
    """Candidates per batch."""


class SecondFeatures(FeatureModule):
    """Statistics of the mel bands of `ClipFeatures`, without its features of rhythm, for windows of about a second."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_features = ClipFeatures()
        self.sample_hz = self.clip_features.sample_hz
        self.config: dict[str, Any] = {}

    @torch.no_grad()
    def forward(self, waves: Tensor, sample_hz: int | None = None) -> Tensor:
        """Compute features `[b, d]` of windows `[b, n]`."""
        resampled = resample(waves.float(), sample_hz or self.sample_hz, self.sample_hz)
        parts = resampled.split(_CLIPS_PER_BATCH)
        return torch.cat([ClipFeatures.band_statistics(self.clip_features.levels(part)) for part in parts])


FEATURES["SecondFeatures"] = SecondFeatures


@typed
def classifier_of_seconds(items: Sequence[AudioItem], folder: Path | None = None) -> AttributeClassifier:
    """Load the classifier of instruments in `folder`, or fit one to the second and the fourth second of clips."""
    if folder is not None and (folder / "config.json").is_file():
        return load_module(folder, expect=AttributeClassifier).requires_grad_(False)  # type: ignore[return-value]
    features, parts = SecondFeatures(), []
    for first in range(0, len(items), _CLIPS_PER_BATCH):
        waves = load_clips(items[first : first + _CLIPS_PER_BATCH], features.sample_hz)
        parts.append(
            torch.stack([features(waves[:, s * features.sample_hz :][:, : features.sample_hz]) for s in (1, 3)])
        )
    inputs = rearrange(torch.cat(parts, dim=1), "s b d -> (s b) d")
    classifier = AttributeClassifier.fit(inputs, {"instrument": labels_of(items, "instrument") * 2}, features)
    if folder is not None:
        save_module(classifier, folder)
    return classifier


def instruments_of_seconds(classifier: AttributeClassifier, waves: Tensor, sample_hz: int) -> np.ndarray:
    """Instrument `[b, seconds]` in every second of waves `[b, n]`."""
    windows = waves.unfold(1, sample_hz, sample_hz)
    names = classifier.predict(rearrange(windows, "b s n -> (b s) n"), sample_hz)["instrument"]
    return np.array(names).reshape(len(waves), -1)


@torch.no_grad()
def stories(
    model: "MusicLM", seconds: AttributeClassifier, real: Sequence[AudioItem], settings: Settings
) -> list[MetricValue]:
    """Measure whether each second before and after the change of a story has the asked instrument.

    Real clips and their codec copies show what the classifier can find; plain pieces of the second text show what the
    model can do without a change.
    """
    names = seconds.classes["instrument"]
    waves = load_clips(real, model.sample_hz, _CLIP_SECONDS)
    truth = np.array(labels_of(real, "instrument"))[:, None]
    chance = 1 / len(names)
    values = []
    for name, clips in {"real clips": waves, "codec copies": reconstruct(model.audio_lm.codec, waves)}.items():
        hits = instruments_of_seconds(seconds, clips, model.sample_hz) == truth
        values.append(MetricValue.mean(f"instrument of a second / {name}", hits.mean(axis=1), chance))
    change = round(settings.change_seconds)
    pairs = _pairs(names, settings.stories)
    texts = [[settings.text.format(name) for name in pair] for pair in pairs]
    music = _music(model, [[(0, a), (change, b)] for a, b in texts], 2 * change, settings)
    found = instruments_of_seconds(seconds, music, model.sample_hz)
    is_first, is_second = (found == np.array([pair[part] for pair in pairs])[:, None] for part in (0, 1))
    plain = _music(model, [b for _, b in texts], change, settings)
    hits = instruments_of_seconds(seconds, plain, model.sample_hz) == np.array([b for _, b in pairs])[:, None]
    rows = {
        "first instrument until 1 s before the change": is_first[:, : change - 1],
        "second instrument from 1 s after the change": is_second[:, change + 1 :],
        "both, without 1 s around the change": np.hstack([is_first[:, : change - 1], is_second[:, change + 1 :]]),
        "second instrument in plain pieces": hits,
    }
    for second in range(-2, min(6, change)):
        part = is_first if second < 0 else is_second
        rows[f"asked instrument in second {second:+d}"] = part[:, change + second : change + second + 1]
    rows["first instrument after the change"] = is_first[:, change + 1 :]
    return values + [MetricValue.mean(f"story / {name}", row.mean(axis=1), chance) for name, row in rows.items()]


@torch.no_grad()
def long_pieces(model: "MusicLM", names: Sequence[str], real: Tensor | None, settings: Settings) -> list[MetricValue]:
    """Measure tempo, key and seams of pieces of 60 s; `real` are real pieces `[b, n]` at the rate of the model."""
    texts = [settings.text.format(names[number % len(names)]) for number in range(settings.long_pieces)]
    music = _music(model, texts, _LONG_PIECE_SECONDS, settings)
    values = []
    for name, waves in {"generated": music, **({} if real is None else {"real": real})}.items():
        values += [*tempo_metrics(name, waves, model.sample_hz), *key_metrics(name, waves, model.sample_hz)]
    return values + seam_metrics(music, model.sample_hz, seams_of(model, _LONG_PIECE_SECONDS))


@torch.no_grad()
def mixtures(model: "MusicLM", classifier: AttributeClassifier, settings: Settings) -> list[MetricValue]:
    """Measure the share of clips in which the classifier finds each of two mixed instruments, and any third one."""
    names = classifier.classes["instrument"]
    pairs = _pairs(names, settings.pairs)
    shares = np.zeros((len(pairs), len(_WEIGHTS), len(names)))
    probabilities = np.zeros((len(pairs), len(_WEIGHTS)))
    for column, weight in enumerate(_WEIGHTS):
        prompts = [
            Mixture([(settings.text.format(a), 1 - weight), (settings.text.format(b), weight)]) for a, b in pairs
        ]
        waves = _candidates(model, prompts, settings)
        for row, (pair, clips) in enumerate(zip(pairs, waves)):
            found = classifier.predict_proba(clips, model.sample_hz)["instrument"]
            shares[row, column] = np.bincount(found.argmax(dim=1).numpy(), minlength=len(names)) / len(found)
            probabilities[row, column] = float(found[:, names.index(pair[1])].mean())
    index = np.array([[names.index(name) for name in pair] for pair in pairs])
    rows = np.arange(len(pairs))
    first, second = (np.stack([shares[rows, column, index[:, part]] for column in range(5)], 1) for part in (0, 1))
    halfway = shares[:, 2].copy()
    halfway[rows[:, None], index] = 0
    third = halfway.max(axis=1)
    half = {
        "first instrument": first[:, 2],
        "second instrument": second[:, 2],
        "most frequent third instrument": third,
        "pairs in which one of the two is more frequent than any third": np.maximum(first, second)[:, 2] > third,
        "pairs in which both are more frequent than any third": np.minimum(first, second)[:, 2] > third,
    }
    values = [MetricValue.mean(f"mixture / halfway / {name}", row) for name, row in half.items()]
    for column, weight in enumerate(_WEIGHTS):
        prefix = f"mixture / weight {weight:g} of the second"
        values.append(MetricValue.mean(f"{prefix} / share of the second", second[:, column]))
        values.append(MetricValue.mean(f"{prefix} / probability of the second", probabilities[:, column]))
    values.append(
        MetricValue.measured(
            "mixture / weights / smallest step of the share of the second",
            lambda rows: float(np.diff(second[rows].mean(axis=0)).min()),
            len(pairs),
        )
    )
    return values


@torch.no_grad()
def negative_text(model: "MusicLM", classifier: AttributeClassifier, settings: Settings) -> list[MetricValue]:
    """Measure the share of clips with drums, for texts with and without drums, without and with negative text."""
    names = classifier.classes["instrument"]
    values: list[MetricValue] = []
    for kind, ending in (("texts without drums", ""), ("texts with drums", " with drums")):
        texts = [settings.text.format(name) + ending for name in names]
        shares = []
        for condition, negative in (("no negative text", None), ('negative text "drums"', "drums")):
            waves = _candidates(model, texts, settings, negative_text=negative)
            found = [classifier.predict(clips, model.sample_hz) for clips in waves]
            has_drums = np.array([labels["drums"] for labels in found]) == "yes"
            is_kept = np.array([labels["instrument"] for labels in found]) == np.array(names)[:, None]
            prefix = f"drums / {kind} / {condition}"
            values.append(MetricValue.mean(f"{prefix} / share with drums", has_drums.mean(axis=1)))
            values.append(MetricValue.mean(f"{prefix} / asked instrument", is_kept.mean(axis=1), 1 / len(names)))
            shares.append(has_drums.mean(axis=1))
        values.append(
            MetricValue.measured(
                f"drums / {kind} / share with the negative text, relative",
                partial(_ratio_of_means, shares[1], shares[0]),
                len(names),
            )
        )
    return values


def _ratio_of_means(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> float:
    return float(a[rows].mean() / max(b[rows].mean(), 1e-9))


def memory(source: str) -> list[MetricValue]:
    """Measure the peak memory of streams of 30 and 60 s, each in its own process."""
    peaks = [peak_bytes_of(_stream, source, seconds) for seconds in (30.0, 60.0)]
    ratio = peaks[1] / peaks[0]
    note = f"{peaks[0] / 1e6:.0f} and {peaks[1] / 1e6:.0f} MB"
    return [MetricValue("memory / peak of a stream of 60 s, relative to 30 s", ratio, ratio, ratio, None, 1, note)]


def _stream(source: str, seconds: float) -> None:
    from musiclm_pytorch.musiclm import MusicLM

    torch.set_num_threads(1)
    for _ in MusicLM.from_pretrained(source).stream("a fast jig", seconds=seconds, num_samples=1, seed=0):
        pass


def _pairs(names: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Pairs of different names, in which every name is equally frequent as the first and as the second one."""
    total = len(names)
    return [(names[i % total], names[(i + 5 + i // total) % total]) for i in range(count)]


def _music(model: "MusicLM", prompts: Sequence[Any], seconds: float, settings: Settings) -> Tensor:
    """Generate one piece per prompt, `[b, n]`."""
    seeds = [settings.seed + number for number in range(settings.num_samples)]
    per_batch = max(1, settings.batch_size // settings.num_samples)
    waves = []
    for first in range(0, len(prompts), per_batch):
        logger.info("piece %d of %d", first + 1, len(prompts))
        part = list(prompts[first : first + per_batch])
        waves.append(model(part, seconds=seconds, num_samples=len(seeds), seeds=seeds, sampling=_sampling(settings)))
    return torch.cat(waves).float().cpu()


def _candidates(model: "MusicLM", prompts: Sequence[Any], settings: Settings, **options: Any) -> Tensor:
    """Generate `settings.seeds` clips for each prompt, `[b, seeds, n]`."""
    per_batch = max(1, settings.batch_size // settings.seeds)
    waves = []
    for first in range(0, len(prompts), per_batch):
        logger.info("clips of prompt %d of %d", first + 1, len(prompts))
        candidates = model(
            list(prompts[first : first + per_batch]),
            seconds=_CLIP_SECONDS,
            num_samples=settings.seeds,
            seed=settings.seed,
            return_all=True,
            sampling=_sampling(settings),
            **options,
        )
        waves.append(candidates.waves)
    return torch.cat(waves).float().cpu()


def _sampling(settings: Settings) -> dict[str, Any] | None:
    scale = settings.guidance_scale
    return None if scale is None else dict.fromkeys(("semantic", "coarse"), {"guidance_scale": scale})


Part = Literal["story", "long", "mixture", "negative", "memory"]


def main(
    model: str,
    data: Path,
    parts: tuple[Part, ...] = ("story", "long", "mixture", "negative", "memory"),
    out: Path = Path("prompts.json"),
    classifier: Path | None = None,
    seconds_classifier: Path | None = None,
    real_pieces: Path | None = None,
    limit: int = 100,
    device: str = "cpu",
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),
) -> None:
    """Measure stories, long pieces, mixtures, negative texts and the memory of streams.

    Args:
        model: Folder of a MusicLM, or name of a bundled MusicLM.
        data: Folder of real clips with the manifests train.jsonl and valid.jsonl, to which classifiers are fitted.
        parts: What to measure.
        out: JSON file for the values; the table is written to a file with the suffix .md.
        classifier: Folder of a fitted classifier of clips; if the folder is empty, a classifier is fitted.
        seconds_classifier: The same for the classifier of the instrument in one second.
        real_pieces: Folder or manifest of real pieces of 60 s, whose tempo and key are measured for comparison.
        limit: Number of real held-out clips on which the classifier of seconds is measured.
        device: Device on which the model runs.
        settings: Numbers of generated pieces.
    """
    from musiclm_pytorch.musiclm import MusicLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = MusicLM.from_pretrained(model, device=device)
    fitted = fitted_classifier(data / "train.jsonl", ATTRIBUTES, classifier)
    names = fitted.classes["instrument"]

    def story() -> list[MetricValue]:
        of_seconds = classifier_of_seconds(load_items(data / "train.jsonl").items, seconds_classifier)
        return stories(musiclm, of_seconds, load_items(data / "valid.jsonl").items[:limit], settings)

    def long() -> list[MetricValue]:
        real = None
        if real_pieces is not None:
            real = load_clips(load_items(real_pieces).items, musiclm.sample_hz, _LONG_PIECE_SECONDS)
        return long_pieces(musiclm, names, real, settings)

    measures: dict[Part, Callable[[], list[MetricValue]]] = {
        "story": story,
        "long": long,
        "mixture": lambda: mixtures(musiclm, fitted, settings),
        "negative": lambda: negative_text(musiclm, fitted, settings),
        "memory": lambda: memory(model),
    }
    report = {"model": model, "model_fingerprint": fingerprint_of(musiclm), "parts": list(parts), **asdict(settings)}
    values: list[MetricValue] = []
    for part in parts:
        values += measures[part]()
        # Written after each part, since generation takes long.
        write_report(out, values, report)
    sys.stdout.write(markdown_table(values))


if __name__ == "__main__":
    tyro.cli(main)
