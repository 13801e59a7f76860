"""Linear probes: features with a known label are read, features without it are at chance."""

import numpy as np
import pytest
import torch
from torch import nn

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from musiclm_pytorch.evaluation.report import MetricValue
from musiclm_pytorch.evaluation.semantic_probes import (
    Features,
    ProbeClips,
    evaluate_semantic,
    event_classes,
    kmeans_features,
    layer_features,
    load_probe_clips,
    log_mel_features,
    probe,
    probe_table,
    token_features,
)
from tests.helpers.semantic_sounds import RATE_HZ, sines, written_corpus

HOP = 320


class CodedEncoder(FrameEncoder):
    """Layer 1 holds the code in the first sample of every frame, one-hot; layer 0 holds noise."""

    sample_hz, downsample_factor, dim, depth = RATE_HZ, HOP, 32, 1

    def num_frames(self, num_samples):
        return num_samples // HOP

    def features(self, wave, lengths=None, layer=None):
        frames = wave.unfold(1, HOP, HOP)
        codes = nn.functional.one_hot((frames[..., 0] * 100).round().long().clamp(0, self.dim - 1), self.dim)
        noise = torch.randn(*codes.shape, generator=torch.Generator().manual_seed(0))
        hidden = codes.float() if layer == 1 else noise
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool)

    def truncated(self, layer):
        return self


class CodedTokenizer(SemanticTokenizer):
    """Tokens are the codes; lengths are cut to a multiple."""

    target_sample_hz, downsample_factor, codebook_size = RATE_HZ, HOP, 32
    seq_len_multiple_of = 10 * HOP

    def num_frames(self, num_samples):
        return num_samples // HOP

    def fingerprint(self):
        return "test"

    def forward(self, wave, input_sample_hz=None, lengths=None):
        if self.seq_len_multiple_of:
            wave = wave[:, : wave.shape[1] // self.seq_len_multiple_of * self.seq_len_multiple_of]
        return (wave.unfold(1, HOP, HOP)[..., 0] * 100).round().long()


@pytest.fixture
def clips(tmp_path) -> ProbeClips:
    """Clips of 25 frames: the first half of the frames has one code, the second another; a label of the clip too."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(36):
        first, second = torch.randint(1, 4, (2,), generator=generator).tolist()
        kind = index % 3
        frames = torch.tensor([first] * 12 + [second] * 13).float() / 100
        frames[::5] = (10 + kind) / 100
        wave = torch.zeros(25, HOP)
        wave[:, 0] = frames
        path = tmp_path / f"{index}.wav"
        write_audio(path, wave.flatten(), RATE_HZ)
        seconds = HOP / RATE_HZ
        events = [[0, 12 * seconds, f"n{first}"], [12 * seconds, 25 * seconds, f"n{second}"]]
        labels = {"kind": f"k{kind}", "note": events, "number": kind}
        items.append(AudioItem(path, None, labels, RATE_HZ, len(wave.flatten())))
    return ProbeClips(items[:24], items[24:])


def test_events_label_the_frames_whose_middle_they_cover():
    """Frames of 0.1 s; the event that starts last counts; frames without an event have no class."""
    events = [[0.25, 0.6, "late"], [0.0, 0.4, "early"]]
    assert event_classes(events, 8, 0.1).tolist() == ["early", "early", "late", "late", "late", "late", "", ""]
    assert event_classes([], 2, 0.1).tolist() == ["", ""]
    for broken in ([[0.0, "name"]], [["a", 1, "b"]], [5]):
        with pytest.raises(ValueError, match="events must be"):
            event_classes(broken, 4, 0.1)


@pytest.mark.slow
def test_a_layer_with_the_label_is_read_and_noise_is_not(clips):
    """Frame labels and clip labels; a number is a class like a text."""
    metrics = {
        metric.name: metric for metric in evaluate_semantic(clips, ["kind", "number"], CodedEncoder(), None, [0, 1])
    }
    assert list(metrics) == [
        f"{name} / {label}" for name in ("log-mel", "layer 0", "layer 1") for label in ("kind", "number")
    ]
    for label in ("kind", "number"):
        assert metrics[f"layer 1 / {label}"].value == 1.0
        assert metrics[f"layer 0 / {label}"].value < 0.9
        assert metrics[f"layer 1 / {label}"].count == 12
        assert metrics[f"layer 1 / {label}"].chance == pytest.approx(4 / 12)
    frames = probe(layer_features(CodedEncoder(), clips, 1), clips, "note")
    # A fifth of the frames holds the code of the clip instead of that of the note.
    assert 0.7 < frames.value < 1.0 and "examples" in frames.note
    assert frames.low <= frames.value <= frames.high and frames.count == 12


def test_tokens_are_read_by_their_frequencies(clips):
    """The tokens of a tokenizer, without the cut of lengths, and k-means tokens of a layer."""
    tokenizer = CodedTokenizer()
    tokens = token_features(tokenizer, clips)
    assert tokens.num_tokens == 32 and all(len(ids) == 25 for ids in tokens.train)
    assert tokenizer.seq_len_multiple_of == 10 * HOP
    assert probe(tokens, clips, "kind").value == 1.0
    assert 0.7 < probe(tokens, clips, "note").value < 1.0
    clusters = kmeans_features(layer_features(CodedEncoder(), clips, 1), 12)
    assert clusters.name == "layer 1, 12 clusters" and clusters.num_tokens == 12
    assert probe(clusters, clips, "kind").value == 1.0
    again = kmeans_features(layer_features(CodedEncoder(), clips, 1), 12)
    assert all(np.array_equal(one, other) for one, other in zip(clusters.test, again.test))
    with pytest.raises(ValueError, match="1000 clusters need at least 1000 training frames, got 600"):
        kmeans_features(layer_features(CodedEncoder(), clips, 1), 1000)


def test_clips_without_the_label_are_left_out(clips):
    """A manifest may join data sets with different labels; a label that nobody has is an error."""
    for item in clips.train[::2] + clips.test[1:]:
        del item.labels["kind"]
    assert probe(token_features(CodedTokenizer(), clips), clips, "kind").count == 1
    with pytest.raises(ValueError, match=r"'mood' needs two classes.*'note', 'number'"):
        probe(token_features(CodedTokenizer(), clips), clips, "mood")


def test_log_mel_frames_lie_in_the_middle_of_the_hops(tmp_path):
    """A click in the middle of hop 30 is loudest in frame 30."""
    wave = torch.zeros(50 * HOP)
    wave[30 * HOP + HOP // 2] = 0.9
    write_audio(tmp_path / "click.wav", wave, RATE_HZ)
    item = AudioItem(tmp_path / "click.wav", None, {}, RATE_HZ, len(wave))
    (frames,) = log_mel_features(ProbeClips([item], [item]), RATE_HZ, HOP).train
    assert frames.shape == (50, 80) and frames.mean(axis=1).argmax() == 30


@pytest.mark.slow
def test_the_pitch_of_a_melody_is_read_from_log_mel_frames(tmp_path):
    """The corpus has the notes of its melodies in the manifest."""
    clips = load_probe_clips(written_corpus(tmp_path), 0.1, limit=10)
    assert (len(clips.train), len(clips.test)) == (6, 4)
    assert load_probe_clips(tmp_path, 0.1, limit=3, seed=1) == load_probe_clips(tmp_path, 0.1, limit=3, seed=1)
    metric = probe(log_mel_features(clips, RATE_HZ, HOP), clips, "pitch_class")
    assert metric.value > 0.4 > metric.chance


def test_broken_features_are_an_error(clips):
    """NaN is an error, not a metric."""
    encoder = CodedEncoder()
    encoder.features = lambda wave, lengths, layer: (torch.full((1, 25, 32), float("nan")), None)
    with pytest.raises(ValueError, match="layer 1: the features contain NaN"):
        layer_features(encoder, clips, 1)


def test_the_interval_resamples_clips():
    """Frames of one clip are right or wrong together: the interval is that of the clips."""
    items = [AudioItem(None, None, {"note": [[0, 10, "ab"[index % 2]]]}, 1, 10) for index in range(40)]
    inputs = [np.full((10, 1), index % 2, dtype=np.float32) for index in range(40)]
    wrong = [1 - part if index < 10 else part for index, part in enumerate(inputs)]
    metric = probe(Features("f", inputs, wrong, 1.0), ProbeClips(items, items), "note")
    assert metric.value == 0.75 and metric.count == 40
    assert metric.low == pytest.approx(0.75 - 0.134, abs=0.03) and metric.high == pytest.approx(0.75 + 0.134, abs=0.03)


def test_the_table_has_a_line_per_features_and_a_column_per_label():
    """Percent with intervals, chance in the first line."""
    metrics = [
        MetricValue("log-mel / digit", 0.5, 0.4, 0.6, 0.1, 9),
        MetricValue("log-mel / a / b", 1.0, 1.0, 1.0, 0.25, 9),
        MetricValue("layer 1 / digit", 0.75, 0.7, 0.8, 0.1, 9),
        MetricValue("layer 1 / a / b", 0.0, 0.0, 0.0, 0.25, 9),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in probe_table(metrics).splitlines()]
    assert rows[0] == ["features", "digit", "a / b"] and rows[2] == ["chance", "10.0", "25.0"]
    assert rows[3] == ["log-mel", "50.0 [40.0, 60.0]", "100.0 [100.0, 100.0]"]
    assert rows[4] == ["layer 1", "75.0 [70.0, 80.0]", "0.0 [0.0, 0.0]"]


def test_sines_have_the_pitch_of_their_events():
    """The helper that plays corpora: A is 440 Hz."""
    wave = sines([[0.0, 1.0, "A"]], 1.0)
    assert int(torch.fft.rfft(wave).abs().argmax()) == 440
