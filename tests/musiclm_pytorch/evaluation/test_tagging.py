from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.tagging import (
    tag_labels,
    tag_metrics,
    tag_prompts,
    tag_scores,
    tag_tests,
)
from musiclm_pytorch.mulan.evaluation import zero_shot_similarities
from musiclm_pytorch.mulan.joint import JointEmbedding


def items_of(*labels: dict) -> list[AudioItem]:
    """Files that do not exist, with these labels."""
    return [AudioItem(Path(f"{i}.wav"), None, own, 8000, 8) for i, own in enumerate(labels)]


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 3])
def test_areas_are_those_of_scikit_learn(rng, levels):
    """Macro one-vs-rest AUC, also where most similarities are tied."""
    from sklearn.metrics import roc_auc_score

    scores = rng.standard_normal((60, 4))
    if levels is not None:
        scores = np.round(scores * levels / 3)
    truth = np.arange(60) % 4
    oracle = np.mean([roc_auc_score(truth == k, scores[:, k]) for k in range(4)])
    assert tag_scores(torch.from_numpy(scores), torch.from_numpy(truth)).auc == pytest.approx(oracle, abs=1e-12)
    metric = tag_metrics("t", torch.from_numpy(scores), torch.from_numpy(truth))[0]
    assert (metric.name, metric.value, metric.chance) == ("t / AUC", pytest.approx(oracle, abs=1e-12), 0.5)
    assert metric.low < oracle < metric.high


@pytest.mark.slow
def test_balanced_accuracy_is_that_of_scikit_learn(rng):
    """Of the nearest prompt, with equal weight for each class."""
    from sklearn.metrics import balanced_accuracy_score

    scores, truth = rng.standard_normal((80, 3)), rng.choice(3, size=80, p=(0.7, 0.2, 0.1))
    oracle = balanced_accuracy_score(truth, scores.argmax(axis=1))
    assert tag_scores(torch.from_numpy(scores), torch.from_numpy(truth)).balanced_accuracy == pytest.approx(oracle)
    metric = tag_metrics("t", torch.from_numpy(scores), torch.from_numpy(truth))[2]
    assert metric.name == "t / balanced accuracy" and metric.value == pytest.approx(oracle)
    assert metric.low < oracle < metric.high and metric.chance == pytest.approx(1 / 3)


def test_perfect_reversed_and_constant_models():
    """One, zero, and chance for equal prompts, even if one class is frequent."""
    truth = torch.tensor([0] * 9 + [1, 2, 2])
    perfect = torch.nn.functional.one_hot(truth, 3).float()
    assert (tag_scores(perfect, truth).auc, tag_scores(perfect, truth).balanced_accuracy) == (1.0, 1.0)
    assert (tag_scores(-perfect, truth).auc, tag_scores(-perfect, truth).balanced_accuracy) == (0.0, 0.0)
    constant = tag_scores(torch.zeros(12, 3), truth)
    assert constant.auc == 0.5 and constant.balanced_accuracy == pytest.approx(1 / 3)


def test_clips_of_unknown_class_are_left_out():
    """Clips with truth -1 change nothing."""
    similarities, truth = torch.randn(20, 2), torch.arange(20) % 2
    more = torch.cat([100 * torch.randn(5, 2), similarities])
    assert tag_scores(more, torch.cat([torch.full((5,), -1), truth])) == tag_scores(similarities, truth)


@pytest.mark.parametrize(
    ("similarities", "truth"),
    [
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])),
        (torch.full((4, 2), float("nan")), torch.tensor([0, 1, 1, 0])),
        (torch.zeros(4), torch.tensor([0, 1, 1, 0])),
        (torch.zeros(4, 2), torch.tensor([0, 1, 1])),
    ],
)
def test_invalid_scores_are_an_error(similarities, truth):
    """One class alone, a class without a prompt, NaN and wrong shapes are errors, not metrics."""
    with pytest.raises(ValueError, match="classes"):
        tag_scores(similarities, truth)


def test_labels_that_describe_are_tags_and_others_are_not():
    """Texts and booleans that recur; no numbers, lists, names of single clips, or labels with one value."""
    rows = [
        {"instrument": "flute", "drums": True, "chords": None, "bpm": 90.5, "tune": "a", "set": "x", "tags": ["a"]},
        {"instrument": "cello", "drums": False, "chords": "piano", "bpm": 120, "tune": "b", "set": "x", "tags": ["b"]},
        {"instrument": "flute", "drums": None, "chords": "piano", "bpm": 90, "tune": "c", "set": "x", "tags": ["b"]},
        {"drums": True, "chords": None, "bpm": 80, "tune": "d", "set": "x", "tags": []},
        {"instrument": "cello", "drums": False, "chords": None, "bpm": 80, "tune": "e", "set": "x", "tags": []},
    ]
    assert tag_labels(items_of(*rows)) == {
        "instrument": ["flute", "cello", "flute", None, "cello"],
        "drums": ["yes", "no", None, "yes", "no"],
        "chords": ["none", "piano", "piano", "none", "none"],
    }
    assert tag_labels([]) == {} and tag_labels(items_of({}, {})) == {}
    many = [{"word": f"w{i % 51}", "some": f"s{i % 50}"} for i in range(102)]
    assert list(tag_labels(items_of(*many))) == ["some"]


def test_labels_that_cannot_be_written_are_no_tags():
    """JSON may hold half of a surrogate pair, which tokenizers and reports cannot encode."""
    half = chr(0xD800)
    kinds = [{"mood": half, half: "calm", "key": "C"}, {"mood": "calm", half: "wild", "key": "D"}]
    assert list(tag_labels(items_of(*kinds, *kinds))) == ["key"]


def test_prompts_of_values():
    """Booleans and "none" become with and without; templates are used for values that need a sentence."""
    assert tag_prompts("drums", ["no", "yes"]) == ["music without drums", "music with drums"]
    assert tag_prompts("chords", ["none", "piano chords"]) == ["music without chords", "piano chords"]
    assert tag_prompts("instrument", ["music_box"]) == ["music box"]
    assert tag_prompts("register", ["low"]) == ["music in a low register"]
    assert tag_prompts("register", ["{low}"]) == ["music in a {low} register"]


class Words(JointEmbedding):
    """The latent of a text is on the axes of its words."""

    axes = ("flute", "cello", "with", "without")

    def __init__(self) -> None:
        super().__init__(dim_latent=len(self.axes), sample_hz=8000)

    def get_audio_latents(self, wavs, lengths=None):
        return wavs

    def get_text_latents(self, texts):
        rows = [[float(axis in text.split()) for axis in self.axes] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_scores_of_a_model_that_knows_the_prompts():
    """From a manifest to scores; a label without relation to the clips has chance."""
    rows = [{"instrument": ("flute", "cello")[i % 2], "drums": i % 3 == 0, "odd": i < 6} for i in range(12)]
    latents = torch.zeros(12, 4)
    for row, own in zip(latents, rows):
        row[Words.axes.index(own["instrument"])] = 1
        row[Words.axes.index("with" if own["drums"] else "without")] = 1
    scores = {}
    for test in tag_tests(items_of(*rows)):
        similarities = zero_shot_similarities(Words(), latents, test.prompts)
        scores[test.label] = tag_scores(similarities, test.truth)
        assert similarities.shape == (12, len(test.values))
    assert scores["instrument"].auc == scores["instrument"].balanced_accuracy == 1.0
    assert scores["drums"].auc == scores["drums"].balanced_accuracy == 1.0
    assert scores["odd"].auc == pytest.approx(0.5)
