import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.semantic import BestRQEncoder, FrameEncoder, KMeansTokenizer
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.evaluation import semantic_check, semantic_views
from musiclm_pytorch.evaluation.semantic_check import check_semantic, check_tokens
from musiclm_pytorch.evaluation.semantic_data import (
    FrameGrid,
    ProbeClip,
    ProbeSet,
    is_held_out,
    load_music,
    load_speech,
    melody_notes,
    onset_labels,
    pitch_class_labels,
)
from musiclm_pytorch.evaluation.semantic_report import judge, score_tables, verdict_tables
from musiclm_pytorch.evaluation.semantic_scores import Reading, Score
from musiclm_pytorch.evaluation.semantic_views import LogMelFrames, views_of
from musiclm_pytorch.recipes.corpus.corpus import make_corpus, plan_clip
from musiclm_pytorch.recipes.corpus.midi import Note
from tests.helpers.semantic_sounds import RATE_HZ, written_corpus, written_digits

HOP = 320
OURS = FrameGrid(RATE_HZ, HOP, HOP)
HUBERT = FrameGrid(16_000, 320, 400)
NUM_DIGITS, SPEECH_CODE = 10, 20


def note(start, seconds, pitch):
    return Note(start, seconds, pitch, 100, 0)


class CodedEncoder(FrameEncoder):
    """Layer 1 reads the label that stands in the first sample of every frame; layer 0 sees only noise."""

    sample_hz, downsample_factor, dim, depth = RATE_HZ, HOP, 32, 1

    def num_frames(self, num_samples):
        if num_samples < HOP:
            raise ValueError("too short")
        return -(-num_samples // HOP)

    def features(self, wave, lengths=None, layer=None):
        count = self.num_frames(wave.shape[1])
        frames = nn.functional.pad(wave, (0, count * HOP - wave.shape[1])).unfold(1, HOP, HOP)
        codes = nn.functional.one_hot((frames[..., 0] * 100).round().long().clamp(0, self.dim - 1), self.dim)
        real = torch.arange(count) < (-(-lengths // HOP))[:, None]
        return (codes.float() if layer == 1 else frames[..., 5 : 5 + self.dim]), real

    def truncated(self, layer):
        return self


def coded_wave(codes, num_samples, generator):
    """Noise that tells log-mel nothing, with a code in the first sample of every frame."""
    wave = 0.1 * torch.randn(num_samples, generator=generator)
    wave[::HOP] = torch.tensor(codes) / 100
    return wave


def coded_clips(num_clips, seed):
    """Melodies and digits that only `CodedEncoder` can read; the speaker is nowhere in the wave."""
    generator = torch.Generator().manual_seed(seed)
    music, speech = [], []
    for _ in range(num_clips):
        pitches = torch.randint(60, 72, (5,), generator=generator).tolist()
        notes = tuple(note(0.2 * place, 0.2, pitch) for place, pitch in enumerate(pitches))
        codes = (1 + pitch_class_labels(notes, OURS, 25)).tolist()
        music.append(ProbeClip(coded_wave(codes, 25 * HOP, generator), {"instrument": "sine"}, notes))
        digit, speaker = torch.randint(NUM_DIGITS, (2,), generator=generator).tolist()
        count = int(torch.randint(6, 12, (), generator=generator))
        wave = coded_wave([SPEECH_CODE + digit] * count, count * HOP - 7, generator)
        speech.append(ProbeClip(wave, {"digit": str(digit), "speaker": "ab"[speaker % 2]}))
    return music, speech


@pytest.fixture(scope="module")
def coded_sets():
    (music, speech), (music_test, speech_test) = coded_clips(60, 0), coded_clips(40, 1)
    return ProbeSet(music, music_test), ProbeSet(speech, speech_test)


def values(check):
    return {(score.view, score.reading, score.probe, score.clusters): score.value for score in check.scores}


def test_frame_labels_of_known_notes():
    """A frame has the note at its centre, the one struck last where two sound, and none in a rest."""
    notes = [note(0.0, 0.10, 60), note(0.16, 0.13, 74), note(0.24, 0.04, 61)]
    # centres at 20, 60, 100, ... ms: the first note ends at 100 ms, just before the third centre
    assert pitch_class_labels(notes, OURS, 9).tolist() == [0, 0, -1, -1, 2, 2, 1, -1, -1]
    assert onset_labels(notes, OURS, 9).tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 0]
    assert onset_labels([note(9.0, 1.0, 60)], OURS, 9).sum() == 0
    assert pitch_class_labels([], OURS, 3).tolist() == [-1, -1, -1]


def test_labels_of_frames_that_overlap():
    """HuBERT's frame i is centred at 320 i + 200 samples; what starts before the first span counts for frame 0."""
    assert HUBERT.centres_seconds(3).tolist() == pytest.approx([200 / 16_000, 520 / 16_000, 840 / 16_000])
    boundary = 360 / 16_000  # halfway between the first two centres
    for start, wanted in ((0.0, 0), (boundary - 1e-4, 0), (boundary, 1), (boundary + 1e-4, 1)):
        assert onset_labels([note(start, 1.0, 60)], HUBERT, 4).tolist().index(1) == wanted
    assert pitch_class_labels([note(0.0125 + 1e-5, 0.02, 62)], HUBERT, 3).tolist() == [-1, 2, -1]


class Arithmetic:
    """Only the numbers of an encoder."""

    def __init__(self, sample_hz, hop, count):
        self.sample_hz, self.downsample_factor, self.num_frames = sample_hz, hop, count


def test_the_grid_follows_from_the_frame_arithmetic():
    """The shortest wave with a frame is its receptive field, whether too short a wave is refused or gives none."""
    encoder = BestRQEncoder(dim=32, depth=1, heads=2, dim_head=16)
    assert FrameGrid.of(encoder) == FrameGrid(16_000, 640, 640)
    assert FrameGrid.of(Arithmetic(16_000, 320, lambda n: (n - 400) // 320 + 1)) == HUBERT
    assert FrameGrid.of(Arithmetic(100, 1, lambda n: n)).shortest_samples == 1
    with pytest.raises(ValueError, match="gives no frame"):
        FrameGrid.of(Arithmetic(100, 1, lambda n: 0))


@pytest.mark.parametrize("grid", [OURS, HUBERT, FrameGrid(24_000, 1920, 1920)])
def test_log_mel_frames_stand_where_the_encoder_s_do(grid):
    """A click is loudest in the frame whose centre it is nearest to, at any rate and hop."""
    frames = LogMelFrames(grid)
    for frame in (0, 3, 7):
        wave = torch.zeros(1, grid.shortest_samples + 9 * grid.hop_samples)
        wave[0, grid.shortest_samples // 2 + frame * grid.hop_samples] = 1.0
        loudness = frames(wave, torch.tensor([wave.shape[1]])).sum(-1)[0, :10]
        assert int(loudness.argmax()) == frame
    # what lies behind an item's end is not heard
    wave = torch.zeros(1, 4000)
    wave[0, 2000:] = 1.0
    silent = frames(wave, torch.tensor([2000]))
    assert torch.equal(silent, frames(torch.zeros(1, 4000), torch.tensor([2000])))


def test_the_layer_that_carries_the_label_wins(coded_sets):
    """Layer 1 carries pitch and digit: probes, tokens and verdict say so; noise and log-mel stay at chance."""
    check = check_semantic(CodedEncoder(), *coded_sets, layers=[0, 1], clusters=[32])
    got = values(check)
    assert isinstance(CodedEncoder(), FrameEncoder)
    for probe, chance in (("pitch class", 0.12), ("digit", 0.15)):
        assert got["layer 1", Reading.LINEAR, probe, None] == 1.0
        assert got["layer 1", Reading.TOKEN, probe, 32] > 0.9
        for view in ("layer 0", "log-mel"):
            assert got[view, Reading.LINEAR, probe, None] < chance + 0.1
            assert got[view, Reading.TOKEN, probe, 32] < chance + 0.1
    assert got["layer 1", Reading.HISTOGRAM, "digit", 32] > 0.9
    # the speaker is not in the wave at all
    assert 0.3 < got["layer 1", Reading.LINEAR, "speaker", None] < 0.7
    verdict = judge(check.scores)
    assert verdict.best_layer == "layer 1" and verdict.content == 1.0
    assert verdict.best_token_layers == {32: "layer 1"}
    won = {(one.layer, one.baseline): one for one in verdict.tokens}
    assert won["layer 1", "log-mel"].wins == ("pitch class", "digit", "digit of a clip")
    assert won["layer 1", "log-mel"].holds and not won["layer 1", "log-mel"].losses
    assert not won["layer 0", "log-mel"].wins
    gains = {metric.name: metric for metric in verdict.gains}
    pitch = gains["layer 1 less log-mel / linear probe / pitch class"]
    assert pitch.low > 0.7 and pitch.value == pytest.approx(1.0 - got["log-mel", Reading.LINEAR, "pitch class", None])
    text = score_tables([(score, score.metric()) for score in check.scores]) + verdict_tables(verdict)
    assert re.search(r"\| layer 1 +\| 100\.0 \[100\.0, 100\.0\] ", text) and "Best layer for content: layer 1 " in text
    assert re.search(r"\| 32 +\| layer 1\* +\| log-mel +\|.*\| yes", text)


class CodedTokenizer(SemanticTokenizer):
    """Its token is the label in the first sample of every frame; -1 behind an item's end, with `shift` added."""

    target_sample_hz, downsample_factor, codebook_size = RATE_HZ, HOP, 32

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift

    def fingerprint(self):
        return "fake"

    def num_frames(self, num_samples):
        return CodedEncoder().num_frames(num_samples)

    def forward(self, wave, input_sample_hz=None, lengths=None):
        codes, real = CodedEncoder().features(wave, lengths, 1)
        return (codes.argmax(-1) + self.shift).masked_fill(~real, -1)


def test_own_tokens_are_read(coded_sets):
    """A token that is the label tells all of it; what it does not hold stays at chance; all clips were heard."""
    check = check_tokens(CodedTokenizer(), *coded_sets)
    assert isinstance(CodedTokenizer(), SemanticTokenizer)
    got = values(check)
    assert {key[0] for key in got} == {"own tokens"} and {key[3] for key in got} == {32}
    assert got["own tokens", Reading.TOKEN, "pitch class", 32] == got["own tokens", Reading.TOKEN, "digit", 32] == 1.0
    assert got["own tokens", Reading.HISTOGRAM, "digit", 32] == 1.0
    assert got["own tokens", Reading.TOKEN, "speaker", 32] < 0.75
    assert ("own tokens", Reading.HISTOGRAM, "instrument", 32) in got and len(got) == 6
    layers = check_semantic(CodedEncoder(), *coded_sets, layers=[1], clusters=[32])
    assert (check.num_clips, check.num_frames) == (layers.num_clips, layers.num_frames)
    # a table of its own, beside k-means of as many clusters
    text = score_tables([(score, score.metric()) for score in (*layers.scores, *check.scores)])
    first, own = text.split("## Own tokens, k = 32\n")
    assert "own tokens" not in first and "## Tokens, k = 32" in first and "layer" not in own
    assert re.search(r"\| own tokens +\| 100\.0 \[100\.0, 100\.0\] ", own) and own.count("| guessing ") == 1


def test_a_cut_of_lengths_moves_no_token(coded_sets):
    """A tokenizer that cuts lengths to whole seconds is measured on the same frames, and keeps its cut."""
    sizes = dict(layer=1, centroids=torch.eye(32))
    plain = KMeansTokenizer(encoder=CodedEncoder(), **sizes)
    cut = KMeansTokenizer(encoder=CodedEncoder(), **sizes, seq_len_multiple_of=RATE_HZ)
    got = values(check_tokens(cut, *coded_sets))
    assert got == values(check_tokens(plain, *coded_sets))
    assert got["own tokens", Reading.TOKEN, "pitch class", 32] == 1.0 and cut.seq_len_multiple_of == RATE_HZ


def test_what_gives_no_tokens_is_refused(coded_sets):
    """Another module, and ids outside the codebook."""
    with pytest.raises(TypeError, match="Linear is no SemanticTokenizer"):
        check_tokens(nn.Linear(2, 2), *coded_sets)
    with pytest.raises(ValueError, match=r"CodedTokenizer gives ids outside 0\.\.31"):
        check_tokens(CodedTokenizer(shift=20), *coded_sets)


def test_shuffled_labels_are_not_found(coded_sets):
    """If digits are dealt out anew, even the layer that carried them is at chance: nothing else leaks to the probe."""
    music, speech = coded_sets
    digits = [clip.labels for clip in speech.train]
    order = torch.randperm(len(digits)).tolist()
    shuffled = [ProbeClip(clip.wave, digits[place]) for clip, place in zip(speech.train, order)]
    check = check_semantic(CodedEncoder(), music, ProbeSet(shuffled, speech.test), layers=[1], clusters=[])
    got = values(check)
    assert got["layer 1", Reading.LINEAR, "digit", None] < 0.4
    assert got["layer 1", Reading.LINEAR, "pitch class", None] == 1.0


def tiny_encoder(**changes):
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=2, heads=1, dim_head=16, sample_hz=RATE_HZ, num_mels=20, n_fft=512, hop_length=80)
    return BestRQEncoder(**sizes, **changes)


def test_clips_keep_their_own_frames_in_batches(coded_sets, monkeypatch):
    """Clips of unequal length that are encoded together get the vectors, in their order, that they get alone."""
    encoder, grid = tiny_encoder().eval(), FrameGrid(RATE_HZ, HOP, HOP)
    music, speech = (ProbeSet(one.train[:12], one.test[:8]) for one in coded_sets)
    sound = semantic_check._sounds(music, speech, encoder.num_frames, grid, width=80)["speech, train"]
    for view in views_of(encoder, grid, [0, 2]):
        together = semantic_views.vectors_of(view, sound, torch.device("cpu"))
        monkeypatch.setattr(semantic_views, "_CLIPS_AT_ONCE", 1)
        alone = semantic_views.vectors_of(view, sound, torch.device("cpu"))
        monkeypatch.undo()
        assert together.shape == (sum(sound.num_frames), view.width)
        assert torch.allclose(together, alone, atol=1e-4)
    wave = rearrange(sound.waves[3], "n -> 1 n")
    own = encoder.features(wave, layer=2)[0][0]
    assert torch.allclose(together[sound.clip_index == 3], own, atol=1e-4)


def test_the_encoder_is_left_as_it_was(coded_sets):
    """Its mode is restored, dropout is off meanwhile, its own front end is a view, and clips and frames are counted."""
    encoder = tiny_encoder(dropout=0.5).train()
    music, speech = (ProbeSet(one.train[:12], one.test[:8]) for one in coded_sets)
    check = check_semantic(encoder, music, speech, layers=[2], clusters=[4])
    assert encoder.training
    assert values(check) == values(check_semantic(encoder.eval(), music, speech, layers=[2], clusters=[4]))
    assert {score.view for score in check.scores} == {"log-mel", "front end", "layer 2"}
    assert check.num_frames["music, train"] == 12 * 25 and check.num_clips["speech, test"] == 8


def test_memory_is_bounded(coded_sets, monkeypatch):
    """Where frames are too many, training clips are left out (of both kinds alike), test clips never."""
    music, speech = coded_sets
    whole = check_semantic(CodedEncoder(), music, speech, layers=[0], clusters=[])
    width = 80
    monkeypatch.setattr(semantic_check, "_MOST_VALUES", width * sum(whole.num_frames.values()) * 2 // 3)
    bounded = check_semantic(CodedEncoder(), music, speech, layers=[0], clusters=[])
    assert width * sum(bounded.num_frames.values()) <= semantic_check._MOST_VALUES
    for side in ("music", "speech"):
        assert bounded.num_clips[f"{side}, test"] == whole.num_clips[f"{side}, test"]
        assert 10 < bounded.num_clips[f"{side}, train"] < 40
    monkeypatch.setattr(semantic_check, "_MOST_VALUES", 1000)
    with pytest.raises(ValueError, match="fewer clips"):
        check_semantic(CodedEncoder(), music, speech, layers=[0], clusters=[])


def test_what_cannot_be_done_is_said_before_anything_is_computed(coded_sets):
    """No such layer, too many clusters, no encoder, a broken encoder: each is named."""
    music, speech = coded_sets
    with pytest.raises(ValueError, match=r"no layer \[2\]: this encoder has layers 0..1"):
        check_semantic(CodedEncoder(), music, speech, layers=[0, 2], clusters=[])
    with pytest.raises(ValueError, match=r"k must lie in 2..\d+, the training frames"):
        check_semantic(CodedEncoder(), music, speech, layers=[0], clusters=[99_999])
    with pytest.raises(TypeError, match="Linear is no FrameEncoder"):
        check_semantic(nn.Linear(2, 2), music, speech, layers=[0], clusters=[])
    broken = tiny_encoder()
    nn.init.constant_(broken.to_tokens.weight, torch.nan)
    with pytest.raises(ValueError, match="layer 1 gives NaN"):
        check_semantic(broken, music, speech, layers=[1], clusters=[])


def test_scores_resample_clips_and_differences_are_paired():
    """Ten clips, five all right, five all wrong: the interval is that of ten items, not of a thousand frames."""
    truth = torch.zeros(1000, dtype=torch.int64)
    clip_index = torch.arange(10).repeat_interleave(100)
    answers = (clip_index % 2).long()
    score = Score.of("layer 1", Reading.LINEAR, "digit", None, truth, answers, clip_index, 10)
    metric = score.metric()
    assert (score.value, metric.value, metric.count) == (0.5, 0.5, 10)
    assert metric.low < 0.25 and metric.high > 0.75
    better = Score.of("layer 2", Reading.LINEAR, "digit", None, truth, answers * (clip_index > 1), clip_index, 10)
    gain = better.gain_over(score)
    assert gain.name == "layer 2 less layer 1 / linear probe / digit" and gain.value == pytest.approx(0.1)
    same = score.gain_over(score)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same questions"):
        score.gain_over(Score.of("layer 2", Reading.LINEAR, "speaker", None, truth, answers, clip_index, 10))


def test_balanced_scores_and_guessing():
    """Balanced: classes count alike, a constant answer gives a half; otherwise guessing is the commonest class."""
    truth = torch.tensor([0] * 9 + [1])
    constant = torch.zeros(10, dtype=torch.int64)
    clip_index = torch.arange(10)
    fair = Score.of("a", Reading.LINEAR, "onset", None, truth, constant, clip_index, 10, balanced=True)
    plain = Score.of("a", Reading.LINEAR, "onset", None, truth, constant, clip_index, 10)
    assert (fair.value, fair.chance) == (0.5, 0.5) and (plain.value, plain.chance) == (0.9, 0.9)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return written_corpus(tmp_path_factory.mktemp("corpus"))


def test_music_is_read_with_its_melody(corpus):
    """The melody given back is the one that was rendered: the pitch of the sine is that of the label in every frame."""
    music = load_music(corpus, RATE_HZ, most_clips=100)
    assert (len(music.train), len(music.test)) == (6, 4)
    clip = music.test[0]
    labels = pitch_class_labels(clip.notes, OURS, 125)
    assert (labels >= 0).sum() > 60
    for frame in torch.nonzero(labels >= 0).flatten().tolist():
        # only frames in which nothing begins or ends: there the spectrum has one peak
        if (
            len({*labels[max(0, frame - 1) : frame + 2].tolist()}) > 1
            or onset_labels(clip.notes, OURS, 126)[frame : frame + 2].any()
        ):
            continue
        part = clip.wave[frame * HOP : (frame + 1) * HOP] * torch.hann_window(HOP)
        hz = float(torch.fft.rfft(part, 2**15).abs().argmax()) * RATE_HZ / 2**15
        assert round(69 + 12 * np.log2(hz / 440)) % 12 == labels[frame]
    # the draw is random, seeded, and a smaller one is the beginning of a larger one
    some = load_music(corpus, RATE_HZ, most_clips=2)
    assert [clip.notes for clip in some.train] == [clip.notes for clip in music.train[:2]]
    other = load_music(corpus, RATE_HZ, most_clips=6, seed=1)
    assert [clip.notes for clip in other.train] != [clip.notes for clip in music.train]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "recipe.json").unlink(), "no recipe.json.*recipes.corpus"),
        (lambda folder: (folder / "recipe.json").write_text("{}"), "num_train"),
        (lambda folder: (folder / "valid.jsonl").unlink(), "no such manifest"),
        (lambda folder: (folder / "train.jsonl").write_text("{}\n"), "1 lines, its recipe.json says 6"),
        (lambda folder: altered_manifest(folder), "composed differently .*make the corpus anew"),
    ],
)
def test_a_corpus_whose_notes_are_not_known_is_refused(corpus, tmp_path, harm, words):
    """Wrong labels would give wrong metrics: a missing recipe or a manifest of other music is refused in one line."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    harm(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_music(folder, RATE_HZ, most_clips=100)
    assert "\n" not in str(caught.value)


def altered_manifest(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[2]["bpm"] += 1
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_takes_below_ten_are_held_out(tmp_path):
    """No take is on both sides, and labels are those of the manifest."""
    speech = load_speech(written_digits(tmp_path / "digits"), RATE_HZ, most_clips=100)
    assert (len(speech.train), len(speech.test)) == (3 * 2 * 4, 3 * 2 * 5)
    assert {clip.labels["speaker"] for clip in speech.test} == {"ann", "bob"}
    assert min(len(clip.wave) for clip in speech.train) == 240
    sides = {
        take: is_held_out(AudioItem(Path(f"x/7_jackson_{take}.wav"), None, {}, 8000, 1)) for take in (0, 5, 9, 10, 49)
    }
    assert sides == {0: True, 5: True, 9: True, 10: False, 49: False}
    with pytest.raises(ValueError, match="7_jackson_12"):
        is_held_out(AudioItem(Path("x/song.wav"), None, {}, 8000, 1))


def test_speech_that_is_none_is_refused(tmp_path):
    """No digits in the manifest, or nothing held out: one line each."""
    folder = written_digits(tmp_path / "digits", takes=range(10, 12))
    with pytest.raises(ValueError, match="0 held out"):
        load_speech(folder, RATE_HZ, most_clips=100)
    (folder / "train.jsonl").write_text('{"audio": "clips/0_ann_10.wav", "digit": 0}\n')
    with pytest.raises(ValueError, match="no speaker"):
        load_speech(folder, RATE_HZ, most_clips=100)


def test_clips_shorter_than_a_frame_are_completed(corpus, tmp_path):
    """A recording of 30 ms has one frame of 40 ms; nothing is refused."""
    speech = load_speech(written_digits(tmp_path / "digits"), RATE_HZ, most_clips=100)
    music = load_music(corpus, RATE_HZ, most_clips=100)
    check = check_semantic(tiny_encoder(), music, speech, layers=[1], clusters=[8])
    assert check.num_clips["speech, train"] == 24
    assert values(check)["log-mel", Reading.LINEAR, "digit", None] > 0.9


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="fluidsynth is not installed")
def test_labels_agree_with_a_rendered_corpus(tmp_path):
    """In solo clips of the real synthesizer the strongest pitch class is mostly the label, less so 120 ms off."""
    corpus = make_corpus(tmp_path / "corpus", num_train=40, num_valid=2, seed=5)
    grid = FrameGrid(16_000, 640, 640)
    window = torch.hann_window(4096)
    hz = torch.arange(2049) * 16_000 / 4096
    bins = torch.nonzero(hz > 150).flatten()
    classes = (69 + 12 * torch.log2(hz[bins] / 440)).round().long() % 12
    agree = dict.fromkeys((-3, 0, 3), 0)
    total = 0
    for index in range(40):
        plan = plan_clip("train", index, 5)
        if plan.row["chords"] or plan.row["drums"] or plan.row["instrument"] in ("music box", "church organ", "choir"):
            continue
        wave = nn.functional.pad(read_audio(corpus / plan.row["audio"], 16_000)[0][0], (2048 - 320, 4096))
        power = torch.stft(wave, 4096, 640, window=window, center=False, return_complex=True).abs().square()[:, :125]
        heard = torch.zeros(12, 125).index_add_(0, classes, power[bins]).argmax(dim=0)
        labels = pitch_class_labels(melody_notes(plan), grid, 125)
        asked = labels >= 0
        total += int(asked.sum())
        for shift in agree:
            agree[shift] += int((heard == labels.roll(shift))[asked.roll(shift)].sum())
    assert total > 500 and agree[0] / total > 0.65
    assert max(agree[-3], agree[3]) < agree[0] - 0.1 * total, agree
