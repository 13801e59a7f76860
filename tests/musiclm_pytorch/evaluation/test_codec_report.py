import math

import pytest
import torch

from audiolm_pytorch.codecs.base import EncodedWave
from audiolm_pytorch.codecs.distances import si_sdr_db, stft_distance
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from musiclm_pytorch.evaluation.codec_report import CodecRow, codec_report, distance_row, rows_table
from musiclm_pytorch.evaluation.report import MetricValue, aligned_table
from tests.helpers.fakes import FakeCodec


def test_row_has_all_distances():
    """The three distances are those of their functions; SI-SDR treats two channels as one signal."""
    target = 0.1 * torch.randn(2, 4000)
    estimate = target + 0.05 * torch.randn(2, 4000)
    row = distance_row("noisy", [(estimate, target)], 16000)
    one_signal = [(wave - wave.mean(dim=1, keepdim=True)).reshape(-1) for wave in (estimate, target)]
    assert row.si_sdr_db.value == pytest.approx(si_sdr_db(*one_signal).item(), abs=1e-6)
    assert row.stft.value == pytest.approx(stft_distance(estimate, target).mean().item())
    assert row.mel_nepers.value == pytest.approx(MultiScaleMelLoss(16000)(estimate[None], target[None]).item())
    quiet = distance_row("quiet", [(target / math.e, target)], 16000)
    assert quiet.mel_nepers.value == pytest.approx(1.0, abs=0.05) and quiet.si_sdr_db.value == 100


@pytest.mark.slow
def test_report_of_a_codec():
    """One row per number of levels: distances of the decoded codes, usage of the codes."""
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
        assert len(row.usage) == levels
    used = len(torch.cat(codes, dim=1)[..., 0].unique())
    assert first.usage[0] == everything.usage[0] == pytest.approx(used / 16)
    with pytest.raises(ValueError, match="no clips"):
        codec_report(codec, [])
    with pytest.raises(ValueError, match="1..4, got 5"):
        codec_report(codec, clips, (5,))


def test_report_uses_scales():
    """A codec with scales is measured with them."""
    codec, clips = FakeCodec(), [torch.rand(1, 1600) * level for level in (0.1, 0.5)]
    wanted = codec_report(codec, clips)[0].mel_nepers

    class Normalising(FakeCodec):
        has_scales = True

        def encode(self, wave):
            return EncodedWave(FakeCodec.tokenize(self, wave), torch.full((1, 1), 2.0))

        def decode(self, codes, scales, num_samples=None):
            return FakeCodec.decode_from_codebook_indices(self, codes, num_samples) * scales[..., None] / 2

        def tokenize(self, wave, lengths=None):
            return pytest.fail("codes alone")

    assert codec_report(Normalising(), clips)[0].mel_nepers == wanted


def test_exact_copy_has_distance_zero():
    """Every distance of a wave to itself is 0; SI-SDR is its upper bound."""
    clips = [torch.randn(2, 3000), torch.zeros(2, 500)]
    row = distance_row("copy", ((clip, clip) for clip in clips), 16000)
    assert (row.mel_nepers.value, row.stft.value, row.si_sdr_db.value) == (0.0, 0.0, 100.0)


def test_interval_contains_the_mean():
    """The interval shrinks with the number of clips."""
    few, many = (MetricValue.mean("x", torch.randn(count).tolist()) for count in (10, 1000))
    for metric in (few, many):
        assert metric.low < metric.value < metric.high
    assert many.high - many.low < (few.high - few.low) / 4


def test_table():
    """One aligned line per row; missing values are empty."""
    value = MetricValue("x", 1.0, 0.5, 1.5, None, 2)
    rows = [
        CodecRow("copy", 2, 3.0, value, value, value),
        CodecRow("codec", 2, 3.0, value, value, value, 2.0, (0.5, 1.0)),
    ]
    lines = rows_table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "1.000 [0.500, 1.500]" in lines[2]
    assert [cell.strip() for cell in lines[3].split("|")][2] == "2.00"
    assert [cell.strip() for cell in lines[3].split("|")][6] == "50 100"
    assert aligned_table([["a", "b"], ["long", ""]]) == "| a    | b |\n| ---- | - |\n| long |   |\n"
