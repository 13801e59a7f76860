"""Melodies of the corpus alone, and the metric of music that follows them."""

from typing import Any

import numpy as np
import pytest
import torch

from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.evaluation.metrics.chroma import PitchClasses
from musiclm_pytorch.melody.notes import PitchNote, notes_of, pitch_classes_at
from musiclm_pytorch.melody.voices import draw_voice, render_melody
from musiclm_pytorch.recipes.corpus.melodies import render_melodies
from musiclm_pytorch.recipes.metrics.melody_metrics import measure
from tests.helpers.installed_sounds import sounds_are_missing


class Item:
    """An item of 100 s with labels alone."""

    path, sample_hz, num_samples = "melody", 1, 100

    def __init__(self, labels: dict[str, Any]) -> None:
        self.labels = labels


@pytest.mark.slow
@pytest.mark.skipif(sounds_are_missing(), reason="FluidSynth or a soundfont is missing")
def test_rendered_melodies_have_their_notes_in_all_instruments() -> None:
    """Renderings of a melody have equal labels and other sounds; other tunes have other notes."""
    clips = render_melodies(2, renderings=2, seed=7)
    rows = [row for _, row in clips]
    assert rows[0]["pitch_class"] == rows[1]["pitch_class"] != rows[2]["pitch_class"]
    assert rows[0]["instrument"] != rows[1]["instrument"] and rows[0]["tune"] != rows[2]["tune"]
    for wave, row in clips:
        found = PitchClasses()(torch.from_numpy(wave).repeat_interleave(4)[::3].unsqueeze(0))[0].numpy()
        notes = pitch_classes_at(notes_of(Item(row)), np.arange(len(found)) * 4096 / 32000)
        assert (found == notes)[notes >= 0].mean() > 0.35  # frames are longer than fast notes


def echo(texts: list[str], melodies: torch.Tensor | None) -> torch.Tensor:
    """A model that plays the melody, or noise without one."""
    return 0.1 * torch.randn(len(texts), 51200) if melodies is None else melodies


def test_chroma_is_that_of_the_given_melody() -> None:
    """1 for a model that plays the melody, and chance with another one and without."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    waves = []
    for _ in range(6):
        notes = [PitchNote(0.8 * i, 0.8 * i + 0.75, int(rng.integers(12))) for i in range(4)]
        waves.append(torch.from_numpy(render_melody(notes, 3.2, 16000, draw_voice(rng, "sine"), rng)))
    melodies = torch.stack(waves)
    features = ClipFeatures()
    labels = {"instrument": ["flute", "cello"] * 3}
    classifier = AttributeClassifier.fit(features(melodies, 16000), labels, features)
    values = {value.name: value for value in measure(echo, 16000, classifier, melodies, 16000)}
    chroma = {name.split(" / ")[1]: value.value for name, value in values.items() if "chroma" in name}
    assert chroma["with the melody"] == 1 and chroma["with another melody"] < 0.4 and chroma["text alone"] < 0.4
    assert "labels / text alone / instrument, accuracy" in values
