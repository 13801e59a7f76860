import json
import shutil

import numpy as np
import pytest
import torch

from audiolm_pytorch.codecs.base import Codec
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.evaluation.codec_report import distance_row
from musiclm_pytorch.evaluation.report import write_report
from musiclm_pytorch.recipes.metrics.codec_metrics import Copy, codec_copies, copies_table, measure_copies, opus_copies
from musiclm_pytorch.recipes.metrics.opus import opus_copy

SAMPLE_HZ = 16_000
PITCHES_HZ = {"flute": 1200.0, "cello": 220.0}
needs_opus = pytest.mark.skipif(shutil.which("opusenc") is None, reason="opus-tools is not installed")


def tones(count, seed):
    """Tones [b, n] of 3 s whose pitch is their instrument."""
    generator = torch.Generator().manual_seed(seed)
    names = [list(PITCHES_HZ)[index % 2] for index in range(count)]
    time = torch.arange(3 * SAMPLE_HZ) / SAMPLE_HZ
    waves = [
        0.2 * torch.sin(2 * torch.pi * PITCHES_HZ[name] * (0.9 + 0.2 * torch.rand((), generator=generator)) * time)
        + 1e-3 * torch.randn(time.shape, generator=generator)
        for name in names
    ]
    return torch.stack(waves), {"instrument": names}


@pytest.fixture(scope="module")
def classifier():
    waves, labels = tones(12, seed=0)
    features = ClipFeatures()
    return AttributeClassifier.fit(features(waves, SAMPLE_HZ), labels, features)


class LevelCodec(Codec):
    """A frame is a sample, and its codes the two bytes of a 16-bit sample; without the second it is coarse."""

    target_sample_hz, downsample_factor, channels, num_quantizers, codebook_size = SAMPLE_HZ, 1, 1, 2, 256

    def fingerprint(self):
        return "test"

    def tokenize(self, wave, lengths=None):
        whole = (wave * 32_767).round().long() + 32_768
        return torch.stack([whole // 256, whole % 256], dim=-1)

    def decode_from_codebook_indices(self, codes, num_samples=None):
        low = codes[..., 1] if codes.shape[-1] > 1 else 128
        return ((codes[..., 0] * 256 + low - 32_768) / 32_767)[:, None, :num_samples]


@pytest.mark.slow
def test_metrics_of_transparent_coarse_and_silent_copies(classifier):
    """The unquantized copy has distance 0, a silent copy has the accuracy of a constant answer."""
    waves, truth = tones(8, seed=5)
    copies = [*codec_copies(LevelCodec(), waves, (None, 1)), Copy("dead", torch.zeros_like(waves), 1.0)]
    real, same, clear, coarse, dead = measure_copies(classifier, waves, SAMPLE_HZ, truth, copies, SAMPLE_HZ)
    for one in (real, same, clear):
        assert one.accuracy["instrument"].value == one.kept["instrument"].value == 1.0
    for one in (real, same):
        assert (one.row.mel_nepers.value, one.row.stft.value, one.row.si_sdr_db.value) == (0.0, 0.0, 100.0)
        assert one.row.kbps is None
    assert (clear.row.kbps, coarse.row.kbps) == (2 * 8 * 16.0, 8 * 16.0)
    assert 0 < clear.row.mel_nepers.value < coarse.row.mel_nepers.value < dead.row.mel_nepers.value
    assert dead.accuracy["instrument"].value == dead.kept["instrument"].value == 0.5
    assert dead.kept["instrument"].low < 0.5 < dead.kept["instrument"].high
    assert dead.row.si_sdr_db.value == -100.0


@pytest.mark.slow
def test_kept_is_the_ratio_of_the_accuracies(classifier):
    """The share is paired by clip: wrong answers on real clips do not count against the copy."""
    waves, truth = tones(8, seed=5)
    truth = {"instrument": ["flute"] * 8}
    real, copy = measure_copies(classifier, waves, SAMPLE_HZ, truth, [Copy("copy", waves)], SAMPLE_HZ)
    assert real.accuracy["instrument"].value == 0.5
    kept = copy.kept["instrument"]
    # paired: an equal copy keeps all in every resample
    assert (kept.value, kept.low, kept.high) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_table_and_report(classifier, tmp_path):
    """One line per copy with intervals; the JSON file has every metric, the markdown file the table."""
    waves, truth = tones(4, seed=5)
    measured = measure_copies(classifier, waves, SAMPLE_HZ, truth, codec_copies(LevelCodec(), waves), SAMPLE_HZ)
    table = copies_table(measured)
    lines = table.splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "instrument, %" in lines[0] and "100.0 [100.0, 100.0]" in lines[4] and "256.00" in lines[4]
    write_report(tmp_path / "metrics.json", [metric for one in measured for metric in one.metrics], {}, table)
    assert (tmp_path / "metrics.md").read_text() == table
    names = [metric["name"] for metric in json.loads((tmp_path / "metrics.json").read_text())["metrics"]]
    assert "codec, 2 of 2 levels / instrument, share of real" in names and len(set(names)) == len(names) == 3 * 5


@pytest.mark.slow
@needs_opus
@pytest.mark.parametrize(("sample_hz", "channels"), [(16000, 1), (24000, 1), (44100, 2)])
def test_opus_is_aligned(sample_hz, channels):
    """The copy has the length of the original and its best correlation at shift 0."""
    time = np.arange(sample_hz + 123) / sample_hz
    sweep = 0.3 * np.sin(2 * np.pi * (200 * time + 900 * time**2)) * (0.6 + 0.4 * np.sin(2 * np.pi * 5 * time))
    wave = torch.from_numpy(np.stack([sweep] * channels)).float()
    copy = opus_copy(wave, sample_hz, 64)
    assert copy.wave.shape == wave.shape
    for row in copy.wave.numpy():
        alike = [np.dot(np.roll(row, shift)[200:-200], sweep[200:-200]) for shift in range(-100, 101)]
        assert int(np.argmax(alike)) - 100 == 0
    assert float((copy.wave - wave).abs().mean()) < 0.02


@pytest.mark.slow
@needs_opus
def test_opus_has_the_requested_bitrate():
    """The packets have about the requested bitrate; a higher bitrate has a smaller distance."""
    wave = 0.2 * torch.randn(1, 2 * SAMPLE_HZ)
    few, many = opus_copies(wave, SAMPLE_HZ, SAMPLE_HZ, (8.0, 64.0))
    assert 4 < few.kbps < 14 and 45 < many.kbps < 90
    rows = [distance_row("opus", [(copy.waves, wave)], SAMPLE_HZ) for copy in (few, many)]
    assert rows[0].mel_nepers.value > rows[1].mel_nepers.value
    copy = next(opus_copies(wave, SAMPLE_HZ, 8000, (8.0,)))
    assert copy.kbps == pytest.approx(few.kbps) and copy.waves.shape == (1, SAMPLE_HZ)
    for kbps in (1, float("nan")):
        with pytest.raises(ValueError, match="Opus supports 6 to 256 kbps, got|kbps must be a number"):
            opus_copy(wave, SAMPLE_HZ, kbps)


def test_opus_needs_its_programs(monkeypatch, tmp_path):
    """The message names the package to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="opusenc and opusdec are missing; .* apt-get install opus-tools"):
        opus_copy(torch.zeros(1, 100), SAMPLE_HZ, 8)
