"""Fréchet and kernel distances of MusicLMs to the same held-out clips, and the differences between the models.

Run as `python -m musiclm_pytorch.recipes.metrics.distances --models tiny OLD --held-out CLIPS.jsonl`.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.clips import load_clips
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet, evaluate
from musiclm_pytorch.evaluation.metrics.frechet import FrechetDistance
from musiclm_pytorch.evaluation.metrics.kernel import KernelDistance
from musiclm_pytorch.evaluation.metrics.set_distance import SetDistance, distance_interval
from musiclm_pytorch.evaluation.music import comparison_table
from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor, bundled_musicnn
from musiclm_pytorch.evaluation.report import MetricValue, write_report
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.recipes.metrics.generation_metrics import from_captions, reconstruct
from musiclm_pytorch.recipes.metrics.model_metrics import CaptionedClips

__all__ = ["distance_difference", "main", "measure_distances"]

logger = logger_named(__name__)


def distance_difference(metric: SetDistance, first: ClipSet, second: ClipSet, real: ClipSet) -> MetricValue:
    """Measure how much larger the distance of `second` to the real clips is than that of `first`.

    Both sets have one clip per caption. The bootstrap draws the same captions and the same real clips for both, so that
    what the sets have in common does not widen the interval.
    """
    distances = [metric.weighted_distance(clips, real) for clips in (first, second)]

    def difference(clips: np.ndarray, reals: np.ndarray) -> float:
        return distances[1](clips, reals) - distances[0](clips, reals)

    value, low, high = distance_interval(difference, (len(first), len(real)))
    name = f"{metric.name} / {second.name} minus {first.name}"
    return MetricValue(name, value, low, high, 0.0, len(first))


def measure_distances(
    models: dict[str, MusicLM],
    items: Sequence[AudioItem],
    seconds: float = 5.0,
    num_samples: int = 4,
    seed: int = 0,
    batch_size: int = 16,
) -> list[MetricValue]:
    """Measure generations of models for the captions of held-out clips, beside codec copies and halves of the clips.

    Args:
        models: Models by name; the MuLaN of the first one embeds the clips of all.
        items: Held-out clips with captions.
        num_samples: Number of candidates per caption; the best one and the first one are measured.
    """
    judge = next(iter(models.values())).mulan_embed_quantizer
    joint, musicnn = JointEmbedder(judge.mulan, "MuLan"), MusicNNExtractor(bundled_musicnn().to(device_of(judge)))
    metrics = [kind(embedder) for embedder in (musicnn, joint) for kind in (FrechetDistance, KernelDistance)]
    clips = CaptionedClips("held-out", [], list(items))
    real = clips.real([musicnn, joint], seconds)
    copies: dict[str, ClipSet] = {}
    best: list[ClipSet] = []
    first: list[ClipSet] = []
    for name, model in models.items():
        codec = model.audio_lm.codec
        if (key := fingerprint_of(codec)) not in copies:
            waves = reconstruct(codec, load_clips(clips.valid, model.sample_hz, seconds), batch_size)
            title = f"codec copies of {name}"
            copies[key] = clips.generated(title, waves, model.sample_hz, [musicnn, joint])
        logger.info("%s: generating from %d captions, %d candidates each", name, len(items), num_samples)
        made = from_captions(model, clips.captions, seconds, num_samples, seed, batch_size)
        best.append(clips.generated(f"{name}, N = {num_samples}", made.best, model.sample_hz, [musicnn, joint]))
        if num_samples > 1:
            first.append(clips.generated(f"{name}, N = 1", made.first, model.sample_hz, [musicnn, joint]))
    values, _ = evaluate(metrics, [*copies.values(), *best, *first], real)
    pairs = [(sets[0], other) for sets in (best, first) for other in sets[1:]]
    return [*values, *(distance_difference(metric, *pair, real) for metric in metrics for pair in pairs)]


def main(
    models: tuple[str, ...],
    held_out: Path,
    out: Path = Path("distances.json"),
    limit: int = 500,
    seconds: float = 5.0,
    num_samples: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Measure the distances of models to held-out clips, and write JSON and a Markdown table.

    Args:
        models: Folders of MusicLMs, or names of bundled ones; the first one is compared with the others.
        held_out: Manifest of clips with captions that no model was trained on, or a folder with it as valid.jsonl.
        out: JSON file for the values; the table is written to a file with the suffix .md.
        limit: Largest number of clips; they are drawn evenly from the manifest.
        seconds: Length of the clips and generations.
        num_samples: Number of candidates per caption.
        seed: Seed of the first candidate.
        device: Device on which the models run.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not models or len(set(models)) < len(models):
        raise ValueError(f"--models needs one name or several different ones, got {list(models)}")
    manifest = held_out / "valid.jsonl" if held_out.is_dir() else held_out
    known = [item for item in load_items(manifest).items if item.caption]
    if min(limit, len(known)) < 4:
        raise ValueError(
            f"at least 4 clips with captions are needed, got {len(known)} in {manifest} and --limit {limit}; "
            "add clips, or raise the limit"
        )
    items = [known[row] for row in np.linspace(0, len(known) - 1, min(limit, len(known))).round().astype(int)]
    loaded = {name: MusicLM.from_pretrained(name, device=device) for name in models}
    values = measure_distances(loaded, items, seconds, num_samples, seed)
    settings = {
        "models": {name: fingerprint_of(model) for name, model in loaded.items()},
        "limit": limit,
        "seconds": seconds,
        "num_samples": num_samples,
        "seed": seed,
    }
    table = comparison_table(values)
    write_report(out, values, settings, table)
    sys.stdout.write(table)


if __name__ == "__main__":
    tyro.cli(main)
