"""A model learns a new timbre from thirty captioned clips: `python -m musiclm_pytorch.recipes.new_timbre --out run`.

Thirty clips alone would make the model forget its other instruments. So the clips that the model generates for captions
of other instruments are part of the training data. The semantic and the coarse stage are trained: all
weights in one run, LoRA in another one. A classifier of instruments is fitted to real clips and their codec copies, and
counts the instruments of generated clips.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe, write_audio
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.files import write_json
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.fine_tuning import FineTuning
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.presets import preset_named
from musiclm_pytorch.recipes.corpus.composition import compose_tune
from musiclm_pytorch.recipes.corpus.instruments import INSTRUMENTS
from musiclm_pytorch.recipes.corpus.performance import TEMPI_BPM, ClipLabels, perform
from musiclm_pytorch.recipes.corpus.render import render_performances
from musiclm_pytorch.recipes.metrics.generation_metrics import reconstruct

__all__ = ["KNOWN", "fit_classifier", "main", "new_clips", "own_clips"]

# The instruments of the bundled model, and the soundfont of its corpus.
KNOWN = tuple(
    "accordion,acoustic guitar,cello,choir,church organ,clarinet,distorted electric guitar,flute,harpsichord,marimba,"
    "music box,piano,trumpet,violin".split(",")
)
_KNOWN_SOUNDFONT = "FluidR3 GM"

_DANCES = ("reel", "jig", "hornpipe", "waltz")
_CHORDS = (None, None, "piano chords", "guitar chords", "string chords")
_WORDINGS = (
    "a {tempo} {dance} played on the {instrument}",
    "{tempo} {instrument} music, a {dance}",
    "{instrument} playing a {tempo} {dance}",
    "solo {instrument} {dance}, {tempo}",
)
_SAMPLE_HZ, _SECONDS, _PEAK, _DRUMS, _BATCH = 16_000, 5.0, 0.7, 0.28, 20
# Clips of each instrument to which the classifier is fitted; they have other tunes than the training clips.
_CLASSIFIER_CLIPS, _FIRST_CLASSIFIER_TUNE = 60, 1000


@dataclass(frozen=True)
class _Clip:
    """A caption in several wordings, and the audio `[n]`."""

    captions: list[str]
    wave: Tensor


def _captions(instrument: str, tempo: str, dance: str) -> list[str]:
    return [wording.format(instrument=instrument, tempo=tempo, dance=dance) for wording in _WORDINGS]


@typed
def new_clips(instrument: str, soundfont: str, count: int, first: int = 0) -> list[_Clip]:
    """Compose and render clips of an instrument; `first` is the number of the first tune."""
    performances, captions = [], []
    for number in range(first, first + count):
        rng = Random(f"{instrument} {number}")
        tempo, dance = rng.choice(list(TEMPI_BPM)), rng.choice(_DANCES)
        tune = compose_tune(dance, rng.choice(("major", "major", "minor")), rng)
        labels = ClipLabels(
            instrument=instrument,
            tempo=tempo,
            register=rng.choice(INSTRUMENTS[instrument].registers),
            chords=rng.choice(_CHORDS),
            drums=rng.random() < _DRUMS,
            bpm=TEMPI_BPM[tempo] * rng.uniform(0.93, 1.07),
        )
        performances.append(perform(tune, labels, rng.randrange(tune.num_bars), _SECONDS, rng))
        captions.append(_captions(instrument, tempo, dance))
    waves = render_performances(performances, [_PEAK] * count, _SECONDS, _SAMPLE_HZ, soundfont)
    return [_Clip(texts, torch.from_numpy(wave)) for texts, wave in zip(captions, waves, strict=True)]


@typed
def own_clips(model: MusicLM, instruments: Sequence[str], count: int, seed: int = 0) -> list[_Clip]:
    """Generate `count` clips of each instrument by the model that is trained further."""
    rng = Random(seed)
    captions = [
        rng.sample(_captions(instrument, rng.choice(list(TEMPI_BPM)), rng.choice(_DANCES)), len(_WORDINGS))
        for instrument in instruments
        for _ in range(count)
    ]
    waves = _generate(model, [texts[0] for texts in captions], seed=1000)
    return [_Clip(texts, wave) for texts, wave in zip(captions, waves, strict=True)]


def _generate(model: MusicLM, captions: Sequence[str], seed: int) -> Tensor:
    """Generate one clip of 5 s for each caption."""
    parts = []
    for first in range(0, len(captions), _BATCH):
        part = captions[first : first + _BATCH]
        parts.append(model(part, num_samples=1, seconds=_SECONDS, seed=seed + first).float().nan_to_num().cpu())
    return torch.cat(parts)


@typed
def fit_classifier(instrument: str, soundfont: str, codec: Any) -> AttributeClassifier:
    """Fit a classifier of the known instruments and a new one, to rendered clips and their codec copies."""
    features, inputs, names = ClipFeatures(), [], []
    for name, font in (*((name, _KNOWN_SOUNDFONT) for name in KNOWN), (instrument, soundfont)):
        clips = new_clips(name, font, _CLASSIFIER_CLIPS, _FIRST_CLASSIFIER_TUNE)
        waves = torch.stack([clip.wave for clip in clips])
        inputs += [features(waves), features(reconstruct(codec, waves, num_levels=4))]
        names += [name] * 2 * len(clips)
    return AttributeClassifier.fit(torch.cat(inputs), {"instrument": names}, features)


def _write(folder: Path, split: str, clips: Sequence[_Clip]) -> None:
    rows = []
    for number, clip in enumerate(clips):
        audio = f"{split}/{number:03d}.wav"
        write_audio(folder / audio, peak_safe(clip.wave), _SAMPLE_HZ)
        rows.append(json.dumps({"audio": audio, "caption": clip.captions[0], "captions": clip.captions}) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


def _accuracies(model: MusicLM, classifier: AttributeClassifier, instruments: dict[str, int]) -> dict[str, float]:
    """Return the share of generated clips in which the classifier finds the instrument of the caption."""
    prompts = [
        (name, _captions(name, list(TEMPI_BPM)[number % 3], _DANCES[number % 4])[0])
        for name, count in instruments.items()
        for number in range(count)
    ]
    found = classifier.predict(_generate(model, [text for _, text in prompts], seed=0), model.sample_hz)["instrument"]
    right = {name: [one == name for one, (asked, _) in zip(found, prompts) if asked == name] for name in instruments}
    return {name: float(np.mean(values)) for name, values in right.items()}


@typed
def main(
    out: Path,
    model: str = "tiny",
    instrument: str = "sitar",
    soundfont: str = "MuseScore General",
    lora_rank: int = 16,
    new_generations: int = 60,
    known_generations: int = 8,
    scale: float = 1.0,
) -> None:
    """Train a model further on 30 clips of a new instrument, with and without LoRA, and write OUT/table.md.

    Args:
        out: Folder of the clips, runs and results.
        model: Model to train further: tiny (bundled), a folder, or a hub id.
        instrument: A new instrument, from the table of the corpus.
        soundfont: Soundfont of the new instrument.
        lora_rank: Rank of the updates of LoRA.
        new_generations: Number of generated clips of the new instrument, for each model.
        known_generations: Number of generated clips of every known instrument.
        scale: Factor for the number of training steps.
    """
    start, data = MusicLM.from_pretrained(model), out / "data"
    if not (data / "lora" / "valid.jsonl").is_file():
        clips, own = new_clips(instrument, soundfont, 36), own_clips(start, KNOWN, 5)
        for name, copies in (("finetune", 2), ("lora", 1)):  # a training of all weights needs more weight on new clips
            _write(data / name, "train", [*clips[:30] * copies, *own])
            _write(data / name, "valid", clips[30:])
    classifier = fit_classifier(instrument, soundfont, start.audio_lm.codec)
    counts = {instrument: new_generations} | dict.fromkeys(KNOWN, known_generations)
    results = {"before": _accuracies(start, classifier, counts)}
    for name, rank in (("finetune", None), ("lora", lora_rank)):
        tuning = FineTuning(model=start, lora_rank=rank)
        pipeline = Pipeline(preset_named(name).scaled(scale), data=data / name, out=out / name, start=tuning)
        for stage in ("semantic", "coarse"):  # the fine stage knows enough
            for report in pipeline.run(stage):
                sys.stdout.write(f"{name} {report.step} {report.seconds:.0f} s\n")
        results[name] = _accuracies(MusicLM.from_pretrained(pipeline.model_folder), classifier, counts)
    write_json(out / "results.json", results)
    lines = ["| instrument | " + " | ".join(results) + " |", "|---" * (1 + len(results)) + "|"]
    means = {name: float(np.mean([values[known] for known in KNOWN])) for name, values in results.items()}
    rows = {f"{instrument} (new)": {name: values[instrument] for name, values in results.items()}}
    rows |= {"the others, mean": means} | {one: {name: v[one] for name, v in results.items()} for one in KNOWN}
    lines += [
        f"| {row} | " + " | ".join(f"{value:.0%}" for value in values.values()) + " |" for row, values in rows.items()
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
