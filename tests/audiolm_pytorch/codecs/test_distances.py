import math

import numpy as np
import pytest
import torch

from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.codecs.measures import MultiResolutionSTFTDistance, WaveDistances, bitrate_kbps, si_sdr_db
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from musiclm_pytorch.evaluation.codec_report import (
    CodecRow,
    Estimate,
    aligned_table,
    codec_report,
    distance_row,
    rows_table,
)
from tests.helpers.fakes import FakeCodec


def naive_si_sdr_db(estimate, target, zero_mean=True):
    """Le Roux et al. 2019, eq. 4 and 5, one wave, in plain float64."""
    estimate, target = np.asarray(estimate, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if zero_mean:
        estimate, target = estimate - estimate.mean(), target - target.mean()
    scaled = np.dot(estimate, target) / np.dot(target, target) * target
    return 10 * math.log10(np.sum(scaled**2) / np.sum((estimate - scaled) ** 2))


@pytest.mark.parametrize("zero_mean", [True, False])
def test_si_sdr_is_the_formula(zero_mean):
    """Every row equals the plain formula, whatever the offset."""
    target = torch.randn(3, 500) + 0.3
    estimate = target + torch.tensor([0.01, 0.5, 20.0])[:, None] * torch.randn(3, 500) - 0.1
    got = si_sdr_db(estimate, target, zero_mean=zero_mean)
    wanted = [naive_si_sdr_db(one, other, zero_mean) for one, other in zip(estimate, target)]
    assert got.tolist() == pytest.approx(wanted, abs=1e-6)
    assert got[0] > 15 and got[2] < 0


def test_si_sdr_knows_no_volume():
    """Scaling the estimate, inverting it, scaling the target or adding a constant changes nothing; more noise does."""
    target, noise = torch.randn(2, 800)
    estimate = target + 0.2 * noise
    wanted = si_sdr_db(estimate, target).item()
    for made, original in ((7 * estimate, target), (-estimate, target), (estimate, 0.01 * target)):
        assert si_sdr_db(made, original).item() == pytest.approx(wanted, abs=1e-4)
    assert si_sdr_db(estimate + 0.5, target - 3.0).item() == pytest.approx(wanted, abs=1e-4)
    assert si_sdr_db(target + 0.4 * noise, target).item() < wanted - 5


def test_si_sdr_of_silence_is_finite():
    """The four cases with silence, and a copy, have the values that the docstring names."""
    wave, silence, constant = torch.randn(100), torch.zeros(100), torch.full((100,), 0.3)
    assert si_sdr_db(wave, wave).item() == 100
    assert si_sdr_db(silence, silence).item() == 100
    assert si_sdr_db(constant, silence).item() == 100
    assert si_sdr_db(silence, wave).item() == -100
    assert si_sdr_db(wave, silence).item() == -100
    assert si_sdr_db(wave, constant).item() == -100
    assert si_sdr_db(torch.ones(1), torch.ones(1)).item() == 100


def test_si_sdr_refuses_other_shapes():
    """A silent broadcast would compare everything with the first sample."""
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
    """Spectral convergence and log distance equal eq. 4 and 5 of the paper, resolution by resolution, row by row."""
    resolutions = ((512, 240, 50), (1024, 600, 120), (2048, 1200, 240))
    target = 0.1 * torch.randn(2, 3000)
    estimate = target + 0.05 * torch.randn(2, 3000)
    got = MultiResolutionSTFTDistance().parts(estimate, target)
    for row in range(2):
        wanted = np.zeros(2)
        for resolution in resolutions:
            made, original = (naive_magnitudes(wave[row].numpy(), *resolution) for wave in (estimate, target))
            wanted[0] += np.linalg.norm(original - made) / np.linalg.norm(original) / 3
            wanted[1] += np.abs(np.log(original) - np.log(made)).mean() / 3
        assert [part[row].item() for part in got] == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(MultiResolutionSTFTDistance()(estimate, target), got[0] + got[1])


def test_stft_distance_is_a_distance():
    """0 for a copy, grows with the noise, finite for silence and one sample, deaf below -80 dB."""
    distance = MultiResolutionSTFTDistance()
    target, noise = 0.1 * torch.randn(2, 4000)
    assert distance(target, target) == 0
    values = [distance(target + level * noise, target).item() for level in (0.01, 0.1, 1.0)]
    assert values == sorted(values) and values[0] > 0
    silence = torch.zeros(4000)
    assert 1 < distance(target, silence) < 1e6 and 1 < distance(silence, target) < 100
    assert distance(silence, silence) == 0
    assert distance(1e-6 * noise, silence) == 0
    assert distance(torch.ones(1), torch.ones(1)) == 0


def test_all_distances_at_once():
    """The three numbers are those of the three measures, two channels counting as one signal."""
    target = 0.1 * torch.randn(2, 4000)
    estimate = target + 0.05 * torch.randn(2, 4000)
    got = WaveDistances(16000)(estimate, target)
    joined = [(wave - wave.mean(dim=1, keepdim=True)).reshape(-1).numpy() for wave in (estimate, target)]
    assert got["si_sdr_db"] == pytest.approx(naive_si_sdr_db(*joined, zero_mean=False), abs=1e-6)
    assert got["stft"] == pytest.approx(MultiResolutionSTFTDistance()(estimate, target).mean().item())
    assert got["mel_nepers"] == pytest.approx(MultiScaleMelLoss(16000)(estimate[None], target[None]).item())
    halved = WaveDistances(16000)(target / math.e, target)
    assert halved["mel_nepers"] == pytest.approx(1.0, abs=0.05) and halved["si_sdr_db"] == 100


def test_bitrate():
    """Levels times bits times frames a second; the paper's 8 x 1024 at 75 Hz is 6 kbps."""
    codec = SoundStream(channels=2, codebook_dim=8, strides=(2, 4, 5, 8), target_sample_hz=24000)
    assert bitrate_kbps(codec) == pytest.approx(6.0)
    assert bitrate_kbps(codec, 2) == pytest.approx(1.5)
    assert bitrate_kbps(FakeCodec()) == pytest.approx(4 * 4 * 50 / 1000)
    for levels in (0, 9):
        with pytest.raises(ValueError, match=f"1..8, got {levels}"):
            bitrate_kbps(codec, levels)


def test_report_of_a_codec():
    """One row a number of levels: distances are those of the codes decoded, use counts the codes, speeds are there."""
    codec = FakeCodec()
    clips = [torch.rand(1, 1600) * level for level in (0.1, 0.5, 0.9)]
    everything, first = codec_report(codec, iter(clips), (None, 1), name="fake")
    assert (everything.name, first.name) == ("fake, 4 levels", "fake, 1 level")
    assert (everything.num_clips, everything.seconds) == (3, 6.0)
    assert (everything.kbps, first.kbps) == pytest.approx((0.8, 0.2))
    codes = [codec.tokenize(clip[None, 0]) for clip in clips]
    for row, levels in ((everything, 4), (first, 1)):
        pairs = [(codec.decode_from_codebook_indices(code[..., :levels])[0], clip) for code, clip in zip(codes, clips)]
        wanted = distance_row(row.name, pairs, codec.target_sample_hz)
        assert (row.mel_nepers, row.stft, row.si_sdr_db) == (wanted.mel_nepers, wanted.stft, wanted.si_sdr_db)
        assert len(row.usage) == len(row.perplexity) == levels
        assert row.encode_speed > 0 and row.decode_speed > 0 and row.num_threads == torch.get_num_threads()
    used = len(torch.cat(codes, dim=1)[..., 0].unique())
    assert first.usage[0] == everything.usage[0] == pytest.approx(used / 16)
    with pytest.raises(ValueError, match="no clips"):
        codec_report(codec, [])
    with pytest.raises(ValueError, match="1..4, got 5"):
        codec_report(codec, clips, (5,))


def test_report_counts_loudness_beside_the_codes():
    """A codec that keeps the loudness of segments beside its codes is measured with it, not without."""
    codec, clips = FakeCodec(), [torch.rand(1, 1600) * level for level in (0.1, 0.5)]
    wanted = codec_report(codec, clips)[0].mel_nepers

    class Normalising(FakeCodec):
        normalises = True

        def encode(self, wave):
            return FakeCodec.tokenize(self, wave), torch.full((1, 1), 2.0)

        def decode(self, codes, scales, num_samples=None):
            return FakeCodec.decode_from_codebook_indices(self, codes, num_samples) * scales[..., None] / 2

        def tokenize(self, wave, lengths=None):
            return pytest.fail("codes alone")

    assert codec_report(Normalising(), clips)[0].mel_nepers == wanted


def test_unquantized_copy_is_the_zero_of_the_yardstick():
    """Every distance of a wave to itself is 0 (SI-SDR: its bound)."""
    clips = [torch.randn(2, 3000), torch.zeros(2, 500)]
    row = distance_row("copy", ((clip, clip) for clip in clips), 16000)
    assert (row.mel_nepers.mean, row.stft.mean, row.si_sdr_db.mean) == (0.0, 0.0, 100.0)


def test_estimate_holds_its_mean():
    """The interval surrounds the mean and shrinks with the number of clips."""
    few, many = (Estimate.of(torch.randn(count).tolist()) for count in (10, 1000))
    for estimate in (few, many):
        assert estimate.low < estimate.mean < estimate.high
    assert many.high - many.low < (few.high - few.low) / 4


def test_table():
    """One line a row below each other, and what a row does not have stays empty."""
    value = Estimate(1.0, 0.5, 1.5)
    rows = [
        CodecRow("copy", 2, 3.0, value, value, value),
        CodecRow("codec", 2, 3.0, value, value, value, 2.0, (0.5, 1.0), (0.25, 0.5), 10.0, 20.0, 1),
    ]
    lines = rows_table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "(1 thread)" in lines[0] and "1.000 [0.500, 1.500]" in lines[2]
    assert [cell.strip() for cell in lines[3].split("|")][6:8] == ["50 100", "25 50"]
    assert aligned_table([["a", "b"], ["long", ""]]) == "| a    | b |\n| ---- | - |\n| long |   |\n"
