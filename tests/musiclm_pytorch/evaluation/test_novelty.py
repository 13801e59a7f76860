"""Novelty: copies of training clips are found, new clips are not."""

import math
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, UnmetNeed
from musiclm_pytorch.evaluation.metrics.novelty import (
    Novelty,
    melody_similarity,
    melody_spectrogram,
    nearest_similarity,
)

SAMPLE_HZ = 16_000


class Planted(Extractor):
    """Features that are set by the test."""

    name, sample_hz = "planted", SAMPLE_HZ

    def __call__(self, waves):
        raise NotImplementedError


EMBEDDER = Planted()


def named_set(name: str, rows: torch.Tensor) -> ClipSet:
    items = [AudioItem(Path(f"{name}-{n}"), None, {}, SAMPLE_HZ, 1) for n in range(len(rows))]
    return ClipSet(name, items, {EMBEDDER.name: list(rows)})


def test_melody_similarity_finds_a_shifted_copy_and_not_another_tune():
    """A copied tune is found when it starts later and is louder; a tune with other notes is not."""
    generator = torch.Generator().manual_seed(0)
    num_samples, shift = 4 * SAMPLE_HZ, round(0.4 * SAMPLE_HZ)

    def tune() -> torch.Tensor:
        semitones = torch.randint(0, 24, (25,), generator=generator)
        pitches_hz = 220.0 * 2 ** (semitones.repeat_interleave(SAMPLE_HZ // 5) / 12)
        return torch.sin(2 * math.pi * pitches_hz.cumsum(0) / SAMPLE_HZ)

    known, other = tune(), tune()
    references = melody_spectrogram(known[None, :num_samples], SAMPLE_HZ)
    queries = torch.stack([0.1 * known[shift : shift + num_samples], other[:num_samples]])
    copied, new = melody_similarity(melody_spectrogram(queries, SAMPLE_HZ), references).tolist()
    assert copied > 0.9
    assert new < 0.5


def test_novelty_of_copies_and_of_new_clips():
    """Copies of training clips are nearer than real clips, new clips are not."""
    generator = torch.Generator().manual_seed(0)
    training, held_out, new = (torch.randn(40, 16, generator=generator) for _ in range(3))
    real = nearest_similarity(held_out, training)
    assert nearest_similarity(training, training).min() > 0.999
    sets = {name: named_set(name, rows) for name, rows in {"real": held_out, "training": training}.items()}
    copies = Novelty(EMBEDDER).measure(named_set("copies", training + 0.01), sets["real"], sets["training"])
    assert [value.note.endswith("nearer than real") for value in copies] == [True, True]
    assert copies[0].value > float(real.mean())
    fresh = Novelty(EMBEDDER).measure(named_set("new", new - 3 * training), sets["real"], sets["training"])
    assert all(value.note.endswith("no nearer than real") for value in fresh)
    real_itself = Novelty(EMBEDDER).floor(sets["real"], sets["training"])
    assert real_itself[0].value == pytest.approx(float(real.mean())) and "nearer" not in real_itself[0].note
    with pytest.raises(UnmetNeed, match="--training"):
        Novelty(EMBEDDER).measure(sets["real"], None, None)
