import math

import numpy as np
import pytest
import torch

from audiolm_pytorch.codecs.distances import si_sdr_db, stft_distance


def naive_si_sdr_db(estimate, target):
    """Le Roux et al. 2019, eq. 4 and 5, one wave, in plain float64."""
    estimate, target = np.asarray(estimate, dtype=np.float64), np.asarray(target, dtype=np.float64)
    estimate, target = estimate - estimate.mean(), target - target.mean()
    scaled = np.dot(estimate, target) / np.dot(target, target) * target
    return 10 * math.log10(np.sum(scaled**2) / np.sum((estimate - scaled) ** 2))


def test_si_sdr_is_the_formula():
    """Every row equals the plain formula, for any offset."""
    target = torch.randn(3, 500) + 0.3
    estimate = target + torch.tensor([0.01, 0.5, 20.0])[:, None] * torch.randn(3, 500) - 0.1
    got = si_sdr_db(estimate, target)
    wanted = [naive_si_sdr_db(one, other) for one, other in zip(estimate, target)]
    assert got.tolist() == pytest.approx(wanted, abs=1e-6)
    assert got[0] > 15 and got[2] < 0


def test_si_sdr_is_scale_invariant():
    """Scaling the estimate, inverting it, scaling the target or adding a constant changes nothing; more noise does."""
    target, noise = torch.randn(2, 800)
    estimate = target + 0.2 * noise
    wanted = si_sdr_db(estimate, target).item()
    for made, original in ((7 * estimate, target), (-estimate, target), (estimate, 0.01 * target)):
        assert si_sdr_db(made, original).item() == pytest.approx(wanted, abs=1e-4)
    assert si_sdr_db(estimate + 0.5, target - 3.0).item() == pytest.approx(wanted, abs=1e-4)
    assert si_sdr_db(target + 0.4 * noise, target).item() < wanted - 5


def test_si_sdr_of_silence_is_finite():
    """The four cases with silence, and a copy, have the values of the docstring."""
    wave, silence, constant = torch.randn(100), torch.zeros(100), torch.full((100,), 0.3)
    assert si_sdr_db(wave, wave).item() == 100
    assert si_sdr_db(silence, silence).item() == 100
    assert si_sdr_db(constant, silence).item() == 100
    assert si_sdr_db(silence, wave).item() == -100
    assert si_sdr_db(wave, silence).item() == -100
    assert si_sdr_db(wave, constant).item() == -100
    assert si_sdr_db(torch.ones(1), torch.ones(1)).item() == 100


def test_si_sdr_of_different_shapes_raises():
    """Broadcasting would compare all samples with the first one."""
    with pytest.raises(ValueError, match=r"same shape.*\[2, 5\] and \[5\]"):
        si_sdr_db(torch.randn(2, 5), torch.randn(5))
    with pytest.raises(ValueError, match="at least one sample"):
        si_sdr_db(torch.randn(0), torch.randn(0))


def naive_magnitudes(wave, n_fft, window, hop):
    """STFT frame by frame in float64: mirrored ends, a centred Hann window, magnitudes of a full-scale sine near 1."""
    padded = np.pad(wave.astype(np.float64), n_fft // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    place = (n_fft - window) // 2
    frames = []
    for start in range(0, len(padded) - n_fft + 1, hop):
        frame = np.zeros(n_fft)
        frame[place : place + window] = padded[start + place : start + place + window] * hann
        frames.append(np.abs(np.fft.rfft(frame)) * 4 / window)
    return np.maximum(np.stack(frames), 1e-4)


def test_stft_distance_is_the_formula():
    """Spectral convergence plus log distance equal eq. 4 and 5 of the paper, mean over resolutions, row by row."""
    resolutions = ((512, 240, 50), (1024, 600, 120), (2048, 1200, 240))
    target = 0.1 * torch.randn(2, 3000)
    estimate = target + 0.05 * torch.randn(2, 3000)
    got = stft_distance(estimate, target)
    for row in range(2):
        expected = 0.0
        for resolution in resolutions:
            s, t = (naive_magnitudes(wave[row].numpy(), *resolution) for wave in (estimate, target))
            expected += np.linalg.norm(t - s) / np.linalg.norm(t) / 3
            expected += np.abs(np.log(t) - np.log(s)).mean() / 3
        assert got[row].item() == pytest.approx(expected, rel=1e-4)


def test_stft_distance_is_a_distance():
    """0 for a copy, grows with the noise, is finite for silence and one sample, ignores parts below -80 dB."""
    target, noise = 0.1 * torch.randn(2, 4000)
    assert stft_distance(target, target) == 0
    values = [stft_distance(target + level * noise, target).item() for level in (0.01, 0.1, 1.0)]
    assert values == sorted(values) and values[0] > 0
    silence = torch.zeros(4000)
    assert 1 < stft_distance(target, silence) < 1e6 and 1 < stft_distance(silence, target) < 100
    assert stft_distance(silence, silence) == 0
    assert stft_distance(1e-6 * noise, silence) == 0
    assert stft_distance(torch.ones(1), torch.ones(1)) == 0
