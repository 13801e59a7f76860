"""Similarity to captions, retrieval, adherence to labels, instrument tags and diversity, on planted clips."""

import numpy as np
import pytest
import torch

from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import FeatureModule
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet, UnmetNeed, extract
from musiclm_pytorch.evaluation.metrics.adherence import AttributeFeatures, LabelAdherence
from musiclm_pytorch.evaluation.metrics.diversity import Diversity
from musiclm_pytorch.evaluation.metrics.instrument_tags import InstrumentTags, named_tags
from musiclm_pytorch.evaluation.metrics.text_retrieval import TextRetrieval
from musiclm_pytorch.evaluation.metrics.text_similarity import TextSimilarity
from musiclm_pytorch.evaluation.musicnn import MusicNN, MusicNNExtractor
from tests.helpers.planted_mulan import PlantedMuLaN, planted_items


@pytest.fixture
def planted(tmp_path) -> tuple[JointEmbedder, ClipSet]:
    embedder = JointEmbedder(PlantedMuLaN(), "MuLan")
    items = planted_items(tmp_path)
    return embedder, ClipSet("planted", items, extract(items, [embedder]))


def test_text_similarity_agrees_with_a_loop(planted):
    """The mean cosine of each clip and its caption, and the mean over all other captions as chance."""
    embedder, clips = planted
    value = TextSimilarity(embedder).measure(clips, None, None)[0]
    audio = [row.numpy() for row in clips.of(embedder)]
    texts = embedder.model.get_text_latents([item.caption for item in clips.items]).numpy()
    own = [float(np.dot(a, t)) for a, t in zip(audio, texts)]
    others = [float(np.dot(a, t)) for i, a in enumerate(audio) for j, t in enumerate(texts) if i != j]
    assert value.value == pytest.approx(np.mean(own), abs=1e-6) and value.value > 0.99
    assert value.chance == pytest.approx(np.mean(others), abs=1e-6)
    assert "MuLan" in value.note and value.count == len(clips)


def test_retrieval_of_planted_clips(planted):
    """Every clip is the first for its caption; one caption alone is refused."""
    embedder, clips = planted
    values = {value.name: value for value in TextRetrieval(embedder).measure(clips, None, None)}
    assert values["retrieval (MuLan) / planted / R@1"].value == 1.0
    with pytest.raises(UnmetNeed, match="2 different captions"):
        TextRetrieval(embedder).measure(clips.select([0], "one"), None, None)


def test_metrics_of_texts_name_a_clip_without_caption(planted, tmp_path):
    """The file is named."""
    embedder, clips = planted
    silent = ClipSet("x", [AudioItem(tmp_path / "nameless.wav", None, {}, 8000, 8)], {"MuLan": [torch.ones(8)]})
    with pytest.raises(UnmetNeed, match="nameless.wav"):
        TextSimilarity(embedder).measure(silent, None, None)


class Header(FeatureModule):
    """The first samples of a wave are its features."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.sample_hz = {}, 8000

    def forward(self, waves, sample_hz=None):
        return waves[:, :7]


def test_adherence_agrees_with_scikit_learn(tmp_path):
    """Accuracy and balanced accuracy; labels that the classifier does not have are left out."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    items = planted_items(tmp_path, confused={"organ": "cello"}, copies=2)
    right = planted_items(tmp_path / "right")
    header = HeaderRows()
    waves = torch.stack(extract(right, [header])["header"])
    labels = {name: [str(item.labels[name]) for item in right] for name in ("instrument", "tempo")}
    classifier = AttributeClassifier.fit(waves, labels, Header())
    features = AttributeFeatures(classifier)
    features.min_seconds = 0.0
    clips = ClipSet("confused", items, extract(items, [features, header]))
    values = {value.name: value for value in LabelAdherence(features).measure(clips, None, None)}
    truth = [item.labels["instrument"] for item in items]
    answers = classifier.predict(torch.stack(clips.of(header)), 8000)["instrument"]
    assert values["labels / confused / instrument, accuracy"].value == pytest.approx(accuracy_score(truth, answers))
    balanced = values["labels / confused / instrument, balanced accuracy"]
    assert balanced.value == pytest.approx(balanced_accuracy_score(truth, answers)) == pytest.approx(2 / 3)
    assert values["labels / confused / tempo, accuracy"].value == 1.0 and len(values) == 4


class HeaderRows(JointEmbedder):
    """The first samples of every clip, read from its file."""

    def __init__(self) -> None:
        super().__init__(PlantedMuLaN(), "header")

    def __call__(self, waves):
        return waves[:, :7]


def test_named_tags():
    """Whole words, plural included; parts of other words do not count."""
    assert named_tags("A slow Violin with guitars and drums") == ["drums", "guitar", "violin"]
    assert named_tags("harpsichord music") == ["harpsichord"]
    assert named_tags("flutes of champagne, drumming") == ["flute"]


def test_instrument_tags_agree_with_a_loop(tmp_path):
    """A tag counts if it is above its mean over the clips that ask for something else."""
    network = MusicNN(tags=["slow", "flute", "piano"]).eval()
    extractor = MusicNNExtractor(network)
    asked = ["flute", "piano", "flute", "piano", "tuba", "flute"]
    items = [AudioItem(tmp_path / f"{n}.wav", None, {"instrument": name}, 1, 1) for n, name in enumerate(asked)]
    tags = torch.rand(len(asked), 3, generator=torch.Generator().manual_seed(0))
    features = [torch.cat([torch.zeros(200), row])[None] for row in tags]
    value = InstrumentTags(extractor).measure(ClipSet("x", items, {"musicnn": features}), None, None)[0]
    right = []
    for column, name in ((1, "flute"), (2, "piano")):
        others = [float(tags[n, column]) for n in range(6) if asked[n] != name]
        right += [float(tags[n, column]) > sum(others) / len(others) for n in range(6) if asked[n] == name]
    assert value.value == pytest.approx(np.mean(right)) and value.count == 5
    alone = ClipSet("x", items[:1], {"musicnn": features[:1]})
    with pytest.raises(UnmetNeed, match="name one of"):
        InstrumentTags(extractor).measure(alone, None, None)


def test_diversity_agrees_with_a_loop(planted):
    """The mean cosine distance of all pairs; equal clips have no diversity."""
    embedder, clips = planted
    value = Diversity(embedder).measure(clips, None, None)[0]
    rows = [row.double().numpy() for row in clips.of(embedder)]
    loop = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(rows) for b in rows[:i]]
    assert value.value == pytest.approx(np.mean(loop), abs=1e-6)
    same = Diversity(embedder).measure(clips.select([0] * 5, "same"), None, None)[0]
    assert same.value == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UnmetNeed, match="at least 2 clips"):
        Diversity(embedder).measure(clips.select([0], "one"), None, None)
