"""The recipe of spoken digits: split, joined clips, cutting and classification of words, and the whole recipe."""

import json
import math
import re
from operator import mul
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.data import AudioItem
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.recipes import spoken_digits
from musiclm_pytorch.recipes.memory import peak_bytes_of
from musiclm_pytorch.recipes.metrics.spoken_metrics import (
    RecognizedWords,
    confidence_metrics,
    confidence_table,
    fit_word_classifier,
    histogram,
    recognized_words,
    speaker_metrics,
    speakers_of,
)
from musiclm_pytorch.recipes.metrics.word_features import WordFeatures, cut_words, padded
from musiclm_pytorch.recipes.semantic import join_words
from musiclm_pytorch.recipes.spoken_digits import build_stages, open_audiolm, split_words

HZ = 16_000
PITCHES_HZ = {"ann": 150.0, "bob": 400.0}


def word(digit: int, speaker: str, seconds: float = 0.4, rate_hz: int = HZ) -> Tensor:
    """A glide up (0) or down (1), with harmonics on the speaker's pitch."""
    times = torch.arange(round(seconds * rate_hz)) / rate_hz
    glide = 1.0 + times / seconds if digit == 0 else 2.0 - times / seconds
    phase = 2 * math.pi * torch.cumsum(PITCHES_HZ[speaker] * glide, 0) / rate_hz
    return 0.2 * (phase.sin() + 0.5 * (2 * phase).sin() + 0.3 * (3 * phase).sin())


def write_words(folder: Path, takes: range) -> None:
    """A collection of two digits and two speakers, with its manifest."""
    lines = []
    for speaker in PITCHES_HZ:
        for digit in (0, 1):
            for take in takes:
                name = f"clips/{digit}_{speaker}_{take}.wav"
                (folder / "clips").mkdir(parents=True, exist_ok=True)
                write_audio(folder / name, word(digit, speaker, 0.3 + 0.01 * (take % 9)), HZ)
                lines.append(json.dumps({"audio": name, "digit": digit, "speaker": speaker}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[AudioItem]:
    """Takes 8 to 11 and 47 to 49."""
    folder = tmp_path_factory.mktemp("digits")
    write_words(folder, range(8, 12))
    more = folder / "train.jsonl"
    first = more.read_text()
    write_words(folder, range(47, 50))
    more.write_text(first + more.read_text())
    return load_items(folder).items


def silence(seconds: float) -> Tensor:
    """Zeros."""
    return torch.zeros(round(seconds * HZ))


def test_words_are_split_by_take(items: list[AudioItem]) -> None:
    """Takes below 10 are for the test alone, from 48 on for validation alone."""
    words = split_words(items)
    takes = {
        name: {int(item.path.stem.split("_")[2]) for item in getattr(words, name)}
        for name in ("train", "valid", "test")
    }
    assert takes == {"train": {10, 11, 47}, "valid": {48, 49}, "test": {8, 9}}
    with pytest.raises(ValueError, match="got 8 recordings of takes 0 to 9, 0 of takes 10 to 47 and 0 of later takes"):
        split_words(words.test)


@pytest.mark.slow
def test_joined_clips_have_words_of_their_speaker(items: list[AudioItem], tmp_path: Path) -> None:
    """All words of a clip are by the speaker of its label, also if the clip exists already."""
    words = split_words(items)
    classifier = fit_word_classifier(words.train)
    clips = join_words(words.test, tmp_path, 3, 3, (0.15, 0.4))
    truth = [str(clip.labels["speaker"]) for clip in clips]
    assert set(truth) == set(PITCHES_HZ)
    waves = torch.stack([read_audio(clip.path, HZ)[0][0] for clip in clips])
    assert speakers_of(classifier, waves, HZ) == truth
    assert [clip.labels for clip in join_words(words.test, tmp_path, 3, 3, (0.15, 0.4))] == [c.labels for c in clips]


def test_recordings_are_cut_at_pauses_and_not_at_stops() -> None:
    """Stops of 60 ms stay inside a word, pauses of 150 ms separate words, words at the ends are left out."""
    stopped = torch.cat([word(0, "ann", 0.2), silence(0.06), word(0, "ann", 0.2)])
    long = word(0, "bob", 1.4)
    wave = torch.cat([word(1, "ann"), silence(0.15), stopped, silence(0.15), long, silence(0.3), word(1, "bob")])
    assert [round(len(piece) / HZ, 1) for piece in cut_words(wave, HZ)] == [0.4, 0.5, 1.4, 0.4]
    assert [round(len(piece) / HZ, 1) for piece in cut_words(wave, HZ, whole_only=True)] == [0.5]
    click = torch.cat([silence(0.3), word(0, "ann", 0.05), silence(0.3)])
    assert cut_words(click, HZ) == [] and cut_words(silence(1.0), HZ) == [] and cut_words(silence(0.001), HZ) == []
    with pytest.raises(ValueError, match="finite"):
        cut_words(torch.full((HZ,), float("nan")), HZ)


def test_features_of_words_ignore_level_and_silence() -> None:
    """Level, silence around a word and other words of a batch change nothing."""
    features, plain = WordFeatures(), word(0, "ann")
    framed = torch.cat([silence(0.2), plain, silence(0.5)])
    alone, louder = features(framed[None]), features(3 * framed[None])
    assert torch.allclose(alone, louder, atol=1e-4)
    assert torch.allclose(alone, features(padded([framed, word(1, "bob", 2.0)]))[:1], atol=1e-5)
    shifted = features(torch.cat([silence(0.4), plain, silence(0.1)])[None])
    assert torch.allclose(alone, shifted, atol=1e-3)
    assert (alone - features(torch.cat([silence(0.2), plain.flip(0), silence(0.5)])[None])).abs().max() > 0.5
    assert torch.isfinite(features(torch.zeros(1, HZ))).all()
    with pytest.raises(ValueError, match="finite"):
        features(torch.full((1, HZ), float("nan")))


@pytest.mark.slow
def test_classifier_of_words_is_the_same_after_saving(items: list[AudioItem], tmp_path: Path) -> None:
    """The classifier is right on held-out words, finds nobody in silence, and loads with equal outputs."""
    words = split_words(items)
    classifier = fit_word_classifier(words.train)
    clip = torch.cat([silence(0.2), word(0, "bob", 0.33), silence(0.2), word(1, "bob", 0.37), silence(0.2)])
    assert speakers_of(classifier, torch.stack([clip, torch.zeros_like(clip)]), HZ) == ["bob", "nobody"]
    heard = recognized_words(classifier, clip[None], HZ)
    assert heard.digits == ["0", "1"] and heard.num_seconds == len(clip) / HZ
    # a glide played backwards is the other digit: the control must reach the classifier
    assert recognized_words(classifier, clip[None], HZ, backwards=True).digits == ["1", "0"]
    save_module(classifier, tmp_path / "classifier")
    again = load_module(tmp_path / "classifier")
    assert isinstance(again.features, WordFeatures)
    assert np.array_equal(recognized_words(again, clip[None], HZ).confidences, heard.confidences)
    with pytest.raises(ValueError, match="silent"):
        recognized_words(classifier, torch.zeros(1, HZ), HZ)


def test_classifiers_of_clips_are_saved_as_before(tmp_path: Path) -> None:
    """A config without the class of its features means features of clips."""
    classifier = AttributeClassifier(
        classes={"drums": ["no", "yes"]}, num_features=3, features=ClipFeatures(num_mels=8)
    )
    assert set(classifier.config) == {"classes", "num_features", "features"}
    save_module(classifier, tmp_path)
    assert isinstance(load_module(tmp_path).features, ClipFeatures)


def test_speakers_are_compared_with_the_right_prompts() -> None:
    """A model that keeps every speaker has 1; a constant answer and exchanged prompts are at chance."""
    truth = ["ann", "bob", "eve"] * 200
    kept, constant, exchanged = speaker_metrics(truth, {"kept": truth, "constant": ["ann"] * 600})
    assert kept.value == 1.0 and kept.chance == pytest.approx(1 / 3) and constant.value == pytest.approx(1 / 3)
    assert abs(exchanged.value - 1 / 3) < 0.08 and exchanged.name == "speaker kept / kept, prompts exchanged"


def test_recognised_share_is_measured_by_the_reference() -> None:
    """95% of the reference words reach the limit, at any level of confidence."""
    real = RecognizedWords(["0"] * 100, np.linspace(0.3, 0.9, 100), 50.0)
    made = RecognizedWords(["0", "1"], np.array([0.2, 0.95]), 4.0)
    metrics = confidence_metrics({"real": real, "made": made}, "real")
    assert metrics[0].value == 0.95 and metrics[1].value == 0.5 and "0.50 words per second" in metrics[1].note
    table = confidence_table({"real": real, "made": made})
    assert re.search(r"\| made +\| 0.50 \| 0.50 \|", table) and "Confidence in made (2 words)" in table


def test_histogram_counts_every_share() -> None:
    """Ten lines hold all numbers, 1.0 included."""
    lines = histogram(np.array([0.0, 0.05, 0.95, 1.0]))
    assert len(lines) == 10
    assert lines[0] == f"0.0 to 0.1  50.0% {'#' * 15}" and lines[-1] == f"0.9 to 1.0  50.0% {'#' * 15}"


@pytest.mark.slow
def test_stages_are_compatible_with_the_bundled_parts() -> None:
    """Levels have no gap, rates are those of the tokenizers, and there is no condition."""
    stages = build_stages(Codec.from_pretrained("codec_16khz"), SemanticTokenizer.from_pretrained("semantic_16khz"))
    assert list(stages) == ["semantic", "coarse", "fine"]
    coarse, fine = (stages["coarse"].sources["coarse"], stages["fine"].sources["fine"])
    assert (coarse.first_level, coarse.num_levels, fine.first_level, fine.num_levels) == (0, 2, 2, 2)
    assert all(stage.cond_dim is None for stage in stages.values())


@pytest.mark.slow
def test_memory_is_that_of_a_separate_process() -> None:
    """The memory of the job counts, that of the calling process does not."""
    ballast = bytearray(2**28)
    small, large = peak_bytes_of(mul, b"x", 2**10), peak_bytes_of(mul, b"x", 2**27)
    assert 0.9 * 2**27 < large - small < 1.5 * 2**27 and len(ballast) == 2**28


@pytest.mark.slow
def test_recipe_runs_and_continues(items: list[AudioItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe writes model and metrics; a second run trains nothing."""
    for name, value in {
        "NUM_CODEC_CLIPS": 20,
        "NUM_CLIPS": 6,
        "NUM_VALID_CLIPS": 2,
        "NUM_PROMPTS": 4,
        "NUM_SAMPLES": 4,
        "MEMORY_SECONDS": (1, 2),
        "MEMORY_RUNS": 1,
        "_SIZES": {"dim": 32, "depth": 1, "heads": 1},
    }.items():
        monkeypatch.setattr(spoken_digits, name, value)
    monkeypatch.setattr(
        spoken_digits, "recognized_words", lambda *_, **__: RecognizedWords(["0"], np.array([0.5]), 1.0)
    )
    # metrics are tested above
    monkeypatch.setattr(spoken_digits, "peak_bytes_of", lambda job, *arguments: job(*arguments) or 2**20)
    data = items[0].path.parents[1]
    spoken_digits.main(data, tmp_path, scale=0.001)
    report = json.loads((tmp_path / "metrics.json").read_text())
    names = {metric["name"] for metric in report["metrics"]}
    assert {"speaker kept / continuations", "recognised as a digit / unconditional samples"} <= names
    assert (
        "memory (MiB) / stream, difference" in names
        and "Confidence in real clips" in (tmp_path / "metrics.md").read_text()
    )
    rows = {stage: (tmp_path / stage / "metrics.jsonl").read_text() for stage in ("codec", "semantic", "fine")}

    def evaluated(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spoken_digits, "evaluate", evaluated)  # the first run has measured the model
    with pytest.raises(KeyboardInterrupt):
        spoken_digits.main(data, tmp_path, scale=0.001)
    assert rows == {stage: (tmp_path / stage / "metrics.jsonl").read_text() for stage in rows}
    with pytest.raises(ValueError, match="codec"):
        open_audiolm(tmp_path / "nowhere")
