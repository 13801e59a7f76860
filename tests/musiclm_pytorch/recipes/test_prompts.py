"""The recipe that measures prompts: each metric on sounds and models with a known result."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from musiclm_pytorch.evaluation.metrics.beat import OnsetEnvelope
from musiclm_pytorch.evaluation.report import MetricValue
from musiclm_pytorch.generation.prompts import Mixture
from musiclm_pytorch.recipes.metrics.long_pieces import (
    exact_tempo,
    key_metrics,
    key_of,
    seam_metrics,
    seams_of,
    tempo_metrics,
)
from musiclm_pytorch.recipes.metrics.prompts import Settings, mixtures, negative_text, stories

SAMPLE_HZ = 16_000
NAMES = ["cello", "flute", "piano", "violin", "organ", "choir"]


def by_name(values: list[MetricValue]) -> dict[str, float]:
    return {value.name.partition(" / ")[2]: value.value for value in values}


def clicks(beats_seconds: np.ndarray, seconds: float) -> Tensor:
    """Short bursts of noise at these times."""
    wave, burst = torch.zeros(round(seconds * SAMPLE_HZ)), torch.rand(400, generator=torch.Generator().manual_seed(0))
    for beat in beats_seconds[beats_seconds < seconds - 0.1]:
        start = round(float(beat) * SAMPLE_HZ)
        wave[start : start + 400] = burst - 0.5
    return wave


@pytest.mark.parametrize("tempo_bpm", [63.0, 97.3, 123.4, 178.9])
def test_tempo_is_exact(tempo_bpm: float) -> None:
    """Within half a per cent, in beats or in groups of beats, although a frame is up to 3% of a beat."""
    wave = clicks(np.arange(0, 20, 60 / tempo_bpm), 10.0)
    measured = exact_tempo(OnsetEnvelope()(wave[None])[0])
    assert min(abs(measured * ratio / tempo_bpm - 1) for ratio in (1, 2, 3, 4)) < 0.005


def test_a_piece_that_gets_faster_does_not_keep_its_tempo() -> None:
    """Three parts of a steady piece have one tempo, those of a faster and faster piece do not."""
    steady = clicks(np.arange(0, 15, 0.5), 15.0)
    faster = clicks(np.concatenate([np.arange(0, 5, 0.5), np.arange(5, 10, 0.45), np.arange(10, 15, 0.41)]), 15.0)
    shares = [
        tempo_metrics("x", torch.stack([piece, piece]), SAMPLE_HZ, part_seconds=5.0)[0].value
        for piece in (steady, faster)
    ]
    assert shares == pytest.approx([1.0, 1 / 3])


def test_keys() -> None:
    """A major triad from D is D major, the A minor scale is A minor; a modulation is measured."""
    assert key_of(np.eye(12)[[2, 6, 9]].sum(axis=0)) == 2
    assert key_of(np.array([1, 0, 1, 0, 1.5, 1, 0, 0, 1, 2, 0, 1.0])) == 12 + 9

    def chord(*semitones: int) -> Tensor:
        times = torch.arange(2 * SAMPLE_HZ) / SAMPLE_HZ
        return sum(torch.sin(2 * torch.pi * 220 * 2 ** (n / 12) * times) for n in semitones) / 5  # type: ignore[return-value]

    a_major, e_flat_major = chord(0, 4, 7), chord(6, 10, 13)
    constant = torch.cat([a_major] * 3)
    modulated = torch.cat([a_major, a_major, e_flat_major])
    values = [by_name(key_metrics("x", torch.stack([wave] * 2), SAMPLE_HZ, 2.0)) for wave in (constant, modulated)]
    assert values[0]["x / parts in the key of the piece"] == 1.0 and values[0]["x / chroma of the rest"] > 0.99
    assert values[1]["x / parts in the key of the piece"] == pytest.approx(2 / 3)
    assert values[1]["x / chroma of the rest"] < 0.5


def test_a_click_at_a_seam_stands_out() -> None:
    """Of a stage whose seams have clicks, and not of another stage."""
    wave = 0.1 * torch.randn(2, 12 * SAMPLE_HZ, generator=torch.Generator().manual_seed(0))
    for second in (5, 7, 9):
        wave[:, second * SAMPLE_HZ : second * SAMPLE_HZ + 160] *= 10
    values = by_name(seam_metrics(wave, SAMPLE_HZ, {"coarse": [5.0, 7.0, 9.0], "fine": [2.2, 3.4, 6.1, 10.3]}))
    for measure in ("spectral flux", "level step", "level"):
        assert values[f"coarse / {measure}, percentile"] > 0.98
        assert values[f"coarse / {measure}, within 5 to 95"] == 0.0
        assert 0.2 < values[f"fine / {measure}, percentile"] < 0.8


@pytest.mark.slow
def test_seams_are_where_windows_end() -> None:
    """Those of the bundled model: windows of 4.8 s, and of 1.92 s in the fine stage."""
    from musiclm_pytorch import MusicLM

    seams = seams_of(MusicLM.from_pretrained("tiny"), 10.0)
    assert seams["semantic"][:2] == pytest.approx([4.8, 7.2]) == seams["coarse"][:2]
    assert seams["fine"][:3] == pytest.approx([1.92, 2.88, 3.84])


class Model:
    """Plays the instrument of a prompt as a constant: its index / 10, and 0.05 more with drums.

    Of a mixture, it plays the heavier part, and the first one of equal parts in every second candidate.
    """

    sample_hz = 100
    audio_lm = SimpleNamespace(codec=None)

    def _level(self, prompt: Any, candidate: int) -> float:
        if isinstance(prompt, Mixture):
            weights = [weight for _, weight in prompt.parts]
            best = candidate % 2 if len(set(weights)) == 1 else int(np.argmax(weights))
            return self._level(prompt.parts[best][0], candidate)
        return NAMES.index(next(name for name in NAMES if name in prompt)) / 10

    def __call__(
        self, prompts: list[Any], *, seconds: float, num_samples: int, return_all: bool = False, **options: Any
    ):
        waves = torch.zeros(len(prompts), num_samples, round(seconds * self.sample_hz))
        for row, prompt in zip(waves, prompts):
            for candidate, wave in enumerate(row):
                for start, part in prompt if isinstance(prompt, list) else [(0, prompt)]:
                    wave[round(start * self.sample_hz) :] = self._level(part, candidate)
            if "drums" in str(prompt) and (options.get("negative_text") is None):
                row += 0.05
        return SimpleNamespace(waves=waves) if return_all else waves[:, 0]


class Classifier:
    """Reads the constants of `Model`."""

    classes = {"instrument": NAMES}

    def predict_proba(self, waves: Tensor, sample_hz: int) -> dict[str, Tensor]:
        return {"instrument": torch.eye(len(NAMES))[(waves.mean(dim=1) * 10 + 0.01).long()]}

    def predict(self, waves: Tensor, sample_hz: int) -> dict[str, list[str]]:
        index = self.predict_proba(waves, sample_hz)["instrument"].argmax(dim=1)
        has_drums = (waves.mean(dim=1) * 10 + 0.01).frac() > 0.3
        return {"instrument": [NAMES[i] for i in index], "drums": ["yes" if drums else "no" for drums in has_drums]}


def test_mixtures_and_negative_texts_of_a_perfect_model() -> None:
    """Every clip has one of the two instruments; the negative text removes all drums."""
    values = by_name(mixtures(Model(), Classifier(), Settings(pairs=6, seeds=4)))  # type: ignore[arg-type]
    assert values["halfway / first instrument"] == values["halfway / second instrument"] == 0.5
    assert values["halfway / pairs in which both are more frequent than any third"] == 1.0
    shares = [values[f"weight {weight:g} of the second / share of the second"] for weight in (0, 0.25, 0.5, 0.75, 1)]
    assert shares == [0, 0, 0.5, 1, 1] and values["weights / smallest step of the share of the second"] == 0
    values = by_name(negative_text(Model(), Classifier(), Settings(seeds=2)))  # type: ignore[arg-type]
    assert values["texts with drums / no negative text / share with drums"] == 1.0
    assert values["texts with drums / share with the negative text, relative"] == 0.0
    assert values["texts without drums / no negative text / asked instrument"] == 1.0


def test_stories_of_a_perfect_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The asked instrument is in every second; 40% of the seconds if the model ignores the change."""
    from musiclm_pytorch.recipes.metrics import prompts

    monkeypatch.setattr(prompts, "load_clips", lambda items, *rest: torch.zeros(2, 500))
    monkeypatch.setattr(prompts, "labels_of", lambda items, name: ["cello", "flute"])
    monkeypatch.setattr(prompts, "reconstruct", lambda codec, waves: waves)
    settings = Settings(stories=6, change_seconds=4.0)
    values = by_name(stories(Model(), Classifier(), [], settings))  # type: ignore[arg-type]
    assert values["real clips"] == 0.5 and values["both, without 1 s around the change"] == 1.0
    assert values["asked instrument in second -1"] == values["asked instrument in second +0"] == 1.0
    assert values["first instrument after the change"] == 0.0
