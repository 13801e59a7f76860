"""Beat strength, tempo and onset correlation of clicks with known times."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.metric import ClipSet
from musiclm_pytorch.evaluation.metrics.beat import (
    Beat,
    OnsetEnvelope,
    autocorrelation_peak,
    is_same_tempo,
    onset_correlation,
)

SAMPLE_HZ = 16_000


def notes(times_seconds, seconds=5.0, seed=0) -> torch.Tensor:
    """Decaying bursts of noise at the given times, [n]."""
    time = torch.arange(int(seconds * SAMPLE_HZ)) / SAMPLE_HZ
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    envelope = torch.zeros(len(time))
    for start in times_seconds:
        envelope += torch.where(time >= start, torch.exp(-20 * (time - start)), 0.0)
    return 0.2 * envelope.clamp(max=1) * noise


def envelopes(*waves) -> list[torch.Tensor]:
    return list(OnsetEnvelope()(torch.stack(waves)))


@pytest.mark.parametrize("bpm", [50.0, 66.0, 108.0, 167.0])
def test_strength_and_tempo_of_a_steady_beat(bpm):
    """Regular notes have a strength near 1 and the right tempo, up to octaves."""
    envelope = envelopes(notes(np.arange(0.1, 5, 60 / bpm)))[0]
    strength, tempo = autocorrelation_peak(envelope)
    assert strength > 0.8
    assert is_same_tempo(tempo, bpm)
    assert not is_same_tempo(tempo, bpm * 1.25)


def test_peak_agrees_with_a_loop():
    """The largest mean product over lags of 25 to 200 frames, divided by the mean square."""
    envelope = envelopes(notes([0.3, 0.9, 1.7, 2.2, 3.3, 4.1]))[0]
    centred = envelope.double().numpy() - envelope.double().numpy().mean()
    loop = [
        sum(centred[i] * centred[i + lag] for i in range(len(centred) - lag)) / (len(centred) - lag)
        for lag in range(25, 201)
    ]
    strength, tempo = autocorrelation_peak(envelope)
    assert strength == pytest.approx(max(loop) / np.mean(centred**2), abs=1e-6)
    assert tempo == pytest.approx(6000 / (25 + int(np.argmax(loop))))


def test_irregular_notes_have_little_strength():
    """Notes at random times."""
    times = np.random.default_rng(0).uniform(0.1, 4.9, 11)
    irregular, regular = envelopes(notes(times), notes(np.arange(0.1, 5, 0.45)))
    assert autocorrelation_peak(irregular)[0] < 0.6 * autocorrelation_peak(regular)[0]


def test_octaves_of_a_tempo():
    """8% are allowed, after octaves; an unknown tempo is never right."""
    assert is_same_tempo(60.0, 120.0) and is_same_tempo(240.0, 60.0) and is_same_tempo(107.0, 100.0)
    assert not is_same_tempo(109.0, 100.0) and not is_same_tempo(90.0, 60.0)
    assert not is_same_tempo(math.nan, 100.0) and not is_same_tempo(100.0, math.nan)


def test_onset_correlation():
    """numpy's correlation; a scaled copy has 1, other times about 0, silence 0."""
    first, copy, other = envelopes(notes([0.5, 1.5, 2.6]), 0.8 * notes([0.5, 1.5, 2.6], seed=1), notes([1.0, 3.1, 4.2]))
    assert onset_correlation(first, other) == pytest.approx(np.corrcoef(first, other)[0, 1], abs=1e-5)
    assert onset_correlation(first, copy) > 0.8 and abs(onset_correlation(first, other)) < 0.3
    assert onset_correlation(first, torch.zeros(100)) == 0.0
    assert onset_correlation(first, first[:300]) == pytest.approx(1.0)


def test_silence_and_noise_below_audibility_have_no_beat():
    """No division by zero, and no tempo."""
    silence, faint = envelopes(torch.zeros(5 * SAMPLE_HZ), 1e-5 * torch.randn(5 * SAMPLE_HZ))
    for envelope in (silence, faint):
        strength, tempo = autocorrelation_peak(envelope)
        assert strength == 0.0 and math.isnan(tempo)


def set_of(name, waves, bpm=None, references=None) -> ClipSet:
    labels = {} if bpm is None else {"bpm": bpm}
    items = [AudioItem(Path(f"{name}{n}"), None, labels, SAMPLE_HZ, 1) for n in range(len(waves))]
    return ClipSet(name, items, {OnsetEnvelope.name: envelopes(*waves)}, references)


def test_metric_uses_labels_or_real_clips():
    """The tempo comes from the label bpm, or from the paired real clip; the correlation needs pairs."""
    fast, slow = notes(np.arange(0.1, 5, 60 / 160)), notes(np.arange(0.1, 5, 60 / 112))
    real = set_of("real", [slow, fast])
    labelled = Beat().measure(set_of("a", [fast, fast], bpm=80), real, None)
    assert [value.name for value in labelled] == ["beat / a / strength", "beat / a / tempo, octaves allowed"]
    assert labelled[1].value == 1.0
    paired = {value.name: value for value in Beat().measure(set_of("a", [fast, fast], references=[0, 1]), real, None)}
    assert paired["beat / a / tempo, octaves allowed"].value == 0.5
    assert paired["beat / a / onsets follow the real clip"].count == 2
    assert [value.name for value in Beat().measure(set_of("a", [fast]), None, None)] == ["beat / a / strength"]
