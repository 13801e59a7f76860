"""Metrics of a MusicGen with melodies and captions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musiclm_pytorch import MusicGen
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.evaluation.metric import Extractor
from musiclm_pytorch.mulan import TextTransformer
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.recipes.corpus.planning import SAMPLE_HZ as MELODY_HZ
from musiclm_pytorch.recipes.metrics.model_metrics import CaptionedClips
from musiclm_pytorch.recipes.metrics.musicgen_metrics import Settings, measure_captions, measure_melodies
from tests.helpers.small_codecs import tiny_codec
from tests.musiclm_pytorch.recipes.test_metrics import SAMPLE_HZ, SECONDS, FakeMusicLM, played, tones, written_items


class Loudness(Extractor):
    """Mean levels of both halves of a clip."""

    name, sample_hz = "loudness", SAMPLE_HZ

    def __call__(self, waves: torch.Tensor) -> torch.Tensor:
        return waves.abs().unflatten(1, (2, -1)).mean(dim=2)


def small_musicgen() -> MusicGen:
    """A random MusicGen with texts and melodies."""
    torch.manual_seed(0)
    text = TextTowerEncoder(TextTransformer(dim=16, depth=1, heads=2, dim_head=8, num_tokens=256))
    sizes = {"dim": 16, "depth": 1, "heads": 2, "max_seconds": SECONDS}
    return MusicGen(codec=tiny_codec().eval(), text_conditioner=text, melody=True, **sizes)


@pytest.mark.slow
def test_metrics_of_a_musicgen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Music of captions has accuracy 1 if it has their instruments; music of a random model follows no melody."""
    settings, features = Settings(seconds=SECONDS, batch_size=3), ClipFeatures()
    waves, labels = tones(24, seed=0)
    classifier = AttributeClassifier.fit(features(waves, SAMPLE_HZ), labels, features)
    model = small_musicgen()
    melodies = torch.sin(torch.arange(round(SECONDS * MELODY_HZ)) * torch.tensor([[0.1], [0.2]]))
    values = {value.name: value for value in measure_melodies(model, classifier, melodies, settings)}
    for name in ("with the melody", "with another melody", "text alone"):
        assert values[f"chroma cosine similarity / {name}"].value < 0.9
        assert values[f"labels / {name} / instrument, accuracy"].count == 2
    all_seeds = []

    def generate(self: MusicGen, *, texts: list[str], seeds: int, **_: Any) -> SimpleNamespace:
        all_seeds.append(seeds)
        words = [text.split()[::-1] for text in texts]
        return SimpleNamespace(waves=[played(*pair, torch.Generator().manual_seed(0)) for pair in words])

    monkeypatch.setattr(MusicGen, "generate", generate)
    clips = CaptionedClips("toy", [], written_items(tmp_path, 4, seed=7))
    metrics = measure_captions(model, classifier, clips, settings, Loudness(), FakeMusicLM())
    values = {value.name: value for value in metrics}
    assert all_seeds == [0, 3]
    for name in ("MusicGen", "MusicLM, N = 1"):
        assert values[f"labels / toy, {name} / instrument, accuracy"].value == 1
        assert values[f"labels / toy, {name} / tempo, accuracy"].value == 1
    distances = [name for name in values if "distance" in name and "codec copies, 2 levels" in name]
    assert len(distances) >= 2
