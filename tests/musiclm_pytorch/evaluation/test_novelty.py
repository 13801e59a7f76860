"""Novelty: copies of training clips are found, new clips are not."""

import math

import torch

from musiclm_pytorch.evaluation.novelty import (
    melody_similarity,
    melody_spectrogram,
    nearest_similarity,
    novelty_metrics,
)

SAMPLE_HZ = 16_000


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
    copies = novelty_metrics("n", nearest_similarity(training + 0.01, training), real)
    assert copies[0].note == "nearer than real"
    assert copies[0].value > copies[1].value
    fresh = novelty_metrics("n", nearest_similarity(new, training) - 0.1, real)
    assert fresh[0].note == fresh[2].note == "no nearer than real"
