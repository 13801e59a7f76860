"""Features of clips, pairs of clips, and what the evaluation leaves out."""

import math
from pathlib import Path

import pytest
import soundfile
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, evaluate, extract, extract_waves, pair_with
from musiclm_pytorch.evaluation.metrics.beat import Beat
from musiclm_pytorch.evaluation.metrics.chroma import ChromaSimilarity
from musiclm_pytorch.evaluation.music import comparison_table, music_metrics, name_parts
from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor
from musiclm_pytorch.evaluation.report import MetricValue

SAMPLE_HZ = 8000


class Mean(Extractor):
    """The mean and the length of a wave; counts how often a batch is computed."""

    name, sample_hz, min_seconds = "mean", SAMPLE_HZ, 0.05

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, waves):
        self.batches += 1
        return torch.stack([waves.mean(dim=1), torch.full((len(waves),), float(waves.shape[1]))], dim=1)


def written(folder, *waves) -> list[AudioItem]:
    items = []
    for number, wave in enumerate(waves):
        write_audio(folder / f"{number}.wav", wave, SAMPLE_HZ)
        items.append(AudioItem(folder / f"{number}.wav", None, {}, SAMPLE_HZ, len(wave)))
    return items


def test_clips_of_unequal_length_have_their_own_features(tmp_path):
    """Clips of equal length share a batch; an extractor that two metrics need is computed once."""
    items = written(tmp_path, torch.full((800,), 0.25), torch.full((1600,), 0.5), torch.full((800,), 0.75))
    extractor = Mean()
    features = extract(items, [extractor, extractor])["mean"]
    expected = torch.tensor([[0.25, 800], [0.5, 1600], [0.75, 800]])
    assert torch.allclose(torch.stack(features), expected, atol=1e-4)
    assert extractor.batches == 2
    shortened = extract(items, [extractor], seconds=0.1)["mean"]
    assert [row[1].item() for row in shortened] == [800] * 3
    in_memory = extract_waves(torch.full((2, 800), 0.25), SAMPLE_HZ, [extractor])["mean"]
    assert in_memory[1].tolist() == pytest.approx([0.25, 800])


def test_bad_clips_are_named(tmp_path):
    """NaN samples, clips that are too short, and features that are not finite."""
    soundfile.write(tmp_path / "broken.wav", [0.0, math.nan] * 400, SAMPLE_HZ, subtype="FLOAT")
    broken = AudioItem(tmp_path / "broken.wav", None, {}, SAMPLE_HZ, 800)
    with pytest.raises(ValueError, match="broken.wav"):
        extract([broken], [Mean()])
    short = written(tmp_path, torch.zeros(80))
    with pytest.raises(ValueError, match="0.wav: has 0.01 s, mean needs at least 0.05 s"):
        extract(short, [Mean()])

    class Broken(Mean):
        def __call__(self, waves):
            return torch.full((len(waves), 2), math.nan)

    with pytest.raises(ValueError, match="1.wav: the features of mean are not finite"):
        extract(written(tmp_path, torch.zeros(800), torch.zeros(800))[1:], [Broken()])


def test_pairs_of_clips(tmp_path):
    """By the label `reference`, or by equal names; None if one clip has no partner."""

    def item(name, **labels):
        return AudioItem(tmp_path / name, None, labels, 1, 1)

    real = [item("a.ogg"), item("b.ogg")]
    assert pair_with([item("b.flac"), item("a.flac"), item("b.wav")], real) == [1, 0, 1]
    assert pair_with([item("0.flac", reference="clips/b.ogg")], real) == [1]
    assert pair_with([item("0.flac", reference="b.ogg"), item("c.flac")], real) is None


def test_missing_needs_are_left_out_with_the_reason():
    """A metric that needs pairs is left out for sets without pairs; others are measured, real clips too."""
    beat, chroma = Beat(), ChromaSimilarity()
    envelopes = {"onset envelope": [torch.rand(500)] * 2, "pitch classes": [torch.zeros(9, dtype=torch.long)] * 2}
    items = [AudioItem(Path(__file__), None, {}, 1, 1)] * 2
    sets = [ClipSet("a", items, envelopes, [0, 1]), ClipSet("b", items, envelopes)]
    values, left_out = evaluate([beat, chroma], sets, ClipSet("real clips", items, envelopes))
    assert (
        list(left_out) == ["chroma cosine similarity / b"] and "'reference'" in left_out["chroma cosine similarity / b"]
    )
    found = {name_parts(value) for value in values}
    assert {("beat / strength", name) for name in ("a", "b", "real clips")} <= found
    assert ("chroma cosine similarity", "a") in found
    table = comparison_table(values)
    assert table.splitlines()[0].split("|")[2].strip() == "a" and "onset envelope, 10-ms frames" in table


def test_every_metric_of_the_list_follows_the_interface():
    """Names are unique, and no name contains the separator of names."""
    metrics = music_metrics(musicnn=MusicNNExtractor())
    assert all(isinstance(metric, Metric) and metric.extractor for metric in metrics)
    names = [metric.name for metric in metrics]
    assert len(set(names)) == len(names) and not any(" / " in name for name in names)
    assert name_parts(MetricValue("m / set / a / b", 1, 1, 1, None, 1)) == ("m / a / b", "set")
