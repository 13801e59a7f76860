import json
import math
from dataclasses import replace

import pytest
import torch

from musiclm_pytorch.evaluation.plots import plot_similarities
from musiclm_pytorch.evaluation.tagging import TagTest
from musiclm_pytorch.mulan.evaluation import (
    embed_clips,
    held_out_items,
    joint_embedding_metrics,
    ordered_similarities,
    text_classes,
    top_clip_metrics,
)
from tests.helpers.planted_mulan import PlantedMuLaN, planted_items


def metrics_of(clips) -> dict:
    return {metric.name: metric for metric in joint_embedding_metrics(clips)}


@pytest.mark.slow
def test_metrics_of_a_perfect_model(tmp_path):
    """Every metric has its best value, with chance and an interval that contains it."""
    metrics = metrics_of(embed_clips(PlantedMuLaN(), planted_items(tmp_path)))
    for direction in ("text to audio", "audio to text"):
        assert metrics[f"retrieval / {direction} / R@1"].value == metrics[f"retrieval / {direction} / mAP"].value == 1
        assert metrics[f"retrieval / {direction} / R@1"].chance == pytest.approx(1 / 12)
        assert metrics[f"retrieval / {direction} / R@1"].count == 12
    for label, classes in (("instrument", 3), ("tempo", 2), ("drums", 2)):
        assert metrics[f"tagging / {label} / AUC"].value == metrics[f"tagging / {label} / balanced accuracy"].value == 1
        assert metrics[f"tagging / {label} / AUC"].chance == 0.5
        assert metrics[f"tagging / {label} / balanced accuracy"].chance == pytest.approx(1 / classes)
        assert metrics[f"top clip / {label} / balanced accuracy"].value == 1
        assert metrics[f"tagging / {label} / average precision"].value == 1
        assert metrics[f"tagging / {label} / average precision"].chance == pytest.approx(1 / classes)
        assert metrics[f"top clip / {label} / balanced accuracy"].chance == pytest.approx(1 / classes)
    assert not any("bpm" in name for name in metrics)
    assert all(metric.low <= metric.value + 1e-9 and metric.value <= metric.high + 1e-9 for metric in metrics.values())


@pytest.mark.slow
def test_metrics_of_a_model_that_confuses_instruments(tmp_path):
    """Nothing is found by instrument, everything by tempo and drums."""
    confused = {"flute": "cello", "cello": "organ", "organ": "flute"}
    metrics = metrics_of(embed_clips(PlantedMuLaN(), planted_items(tmp_path, confused)))
    assert metrics["retrieval / text to audio / R@1"].value == metrics["retrieval / audio to text / R@1"].value == 0
    assert metrics["tagging / instrument / AUC"].value < 0.5 and metrics["tagging / tempo / AUC"].value == 1
    for label, accuracy in (("instrument", 0), ("tempo", 1), ("drums", 1)):
        assert metrics[f"tagging / {label} / balanced accuracy"].value == accuracy
        assert metrics[f"top clip / {label} / balanced accuracy"].value == accuracy


@pytest.mark.slow
def test_captions_of_several_clips_are_one_query(tmp_path):
    """Two clips per caption: twelve queries with two right clips, and twelve candidates with one right caption."""
    clips = embed_clips(PlantedMuLaN(), planted_items(tmp_path, copies=2))
    assert clips.relevant.shape == (12, 24) and clips.relevant.sum(dim=1).tolist() == [2] * 12
    metrics = metrics_of(clips)
    found, back = (metrics[f"retrieval / {way} / R@1"] for way in ("text to audio", "audio to text"))
    assert (found.value, found.count, back.value, back.count) == (1, 12, 1, 24)
    assert found.chance == pytest.approx(2 / 24) and back.chance == pytest.approx(1 / 12)


@pytest.mark.slow
def test_clips_without_captions_are_candidates_only(tmp_path):
    """They are ranked and tagged, but are no queries; each of several captions of a clip is a query."""
    items = planted_items(tmp_path)
    items[0] = replace(items[0], caption=None)
    items[1] = replace(items[1], labels={**items[1].labels, "captions": ["slow flute without drums at all", " "]})
    clips = embed_clips(PlantedMuLaN(), items)
    assert clips.relevant.shape == (12, 12) and clips.relevant[:, 0].sum() == 0 and clips.relevant[:, 1].sum() == 2
    metrics = metrics_of(clips)
    assert metrics["retrieval / audio to text / R@1"].count == 11
    assert metrics["tagging / instrument / AUC"].count == 12


@pytest.mark.slow
def test_labels_alone_are_enough(tmp_path):
    """Without captions the prompts of the first label are the queries; without labels there is only retrieval."""
    items = [replace(item, caption=None) for item in planted_items(tmp_path)]
    clips = embed_clips(PlantedMuLaN(), items)
    assert clips.texts == ["cello", "flute", "organ"] and not clips.are_captions
    metrics = metrics_of(clips)
    assert metrics["retrieval / text to audio / mAP"].value == metrics["tagging / tempo / AUC"].value == 1
    assert not any(name.startswith("top clip") for name in metrics)
    bare = [replace(item, labels={}) for item in planted_items(tmp_path)]
    names = {name.split(" / ")[0] for name in metrics_of(embed_clips(PlantedMuLaN(), bare))}
    assert names == {"retrieval"}
    with pytest.raises(ValueError, match="neither two different captions nor a label"):
        embed_clips(PlantedMuLaN(), [replace(item, caption="the same") for item in bare])


def test_clips_of_unequal_lengths_keep_their_places(tmp_path):
    """Batches are sorted by length; the columns of the similarities are in the order of the items."""
    items = planted_items(tmp_path)
    clips, reverse = (embed_clips(PlantedMuLaN(), chosen) for chosen in (items, items[::-1]))
    assert torch.allclose(clips.similarities, reverse.similarities.flip(0, 1), atol=1e-6)


def test_nan_is_an_error(tmp_path):
    """The message names the inputs."""
    items = planted_items(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity for texts"):
        embed_clips(PlantedMuLaN(gap=math.nan), items)


def test_a_text_has_the_class_of_all_its_clips():
    """A text has no class if its clips differ, if one is unknown, or without clips."""
    truth = torch.tensor([0, 0, 1, -1])
    relevant = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert text_classes(truth, relevant).tolist() == [0, -1, 1, -1, -1]


def test_chance_of_top_clips_is_that_of_random_clips():
    """A clip of unknown class is wrong; classes are weighted alike; a single class is no task."""
    test = TagTest("tempo", ("fast", "slow"), ("fast", "slow"), torch.tensor([0, 0, 0, 1, -1]))
    relevant = torch.eye(5).bool()[:4]
    top = torch.tensor([0, 1, 4, 0])
    similarities = torch.nn.functional.one_hot(top, 5).float()
    (balanced,) = top_clip_metrics("t", similarities, relevant, [test])
    assert (balanced.name, balanced.count) == ("t / tempo / balanced accuracy", 4)
    assert balanced.value == pytest.approx((2 / 3 + 0) / 2) and balanced.chance == pytest.approx((3 / 5 + 1 / 5) / 2)
    assert top_clip_metrics("t", similarities[:3], relevant[:3], [test]) == []


def test_held_out_items_of_a_folder(tmp_path):
    """valid.jsonl is used; a limit draws by seed and keeps the order; a limit below two is an error."""
    items = planted_items(tmp_path)
    for name, chosen in (("train", items), ("valid", items[2:10])):
        lines = [json.dumps({"audio": item.path.name, "caption": item.caption, **item.labels}) for item in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = held_out_items(tmp_path)
    assert [item.path for item in found] == [item.path for item in items[2:10]]
    assert len(held_out_items(tmp_path / "train.jsonl")) == 12
    some = held_out_items(tmp_path, limit=4, seed=1)
    assert some == held_out_items(tmp_path, 4, 1) != held_out_items(tmp_path, 4, 2)
    places = [found.index(item) for item in some]
    assert places == sorted(places) and len(places) == 4
    with pytest.raises(ValueError, match="at least 2"):
        held_out_items(tmp_path, limit=1)


def test_texts_and_clips_are_ordered_by_a_label(tmp_path):
    """Classes are neighbours, unknown ones last; a text is placed like its first clip; another label, another order."""
    items = planted_items(tmp_path)
    items[3] = replace(items[3], labels={"tempo": "fast"})
    clips = embed_clips(PlantedMuLaN(), items)
    cosines, texts, names = ordered_similarities(clips, "instrument")
    assert names == ["cello"] * 4 + ["flute"] * 3 + ["organ"] * 4 + ["unknown"] and texts == names
    assert cosines.diagonal() == pytest.approx(1)
    assert ordered_similarities(clips, "tempo")[2] == ["fast"] * 6 + ["slow"] * 6
    bare = embed_clips(PlantedMuLaN(), [replace(item, labels={}) for item in items])
    assert ordered_similarities(bare)[2] == ["unknown"] * 12
    assert torch.equal(ordered_similarities(bare)[0], bare.similarities)


@pytest.mark.slow
def test_the_plot_shows_what_is_measured(tmp_path):
    """Plots of two models differ, and so do plots by another label."""
    imread = pytest.importorskip("matplotlib.image").imread
    items = planted_items(tmp_path)
    clips = embed_clips(PlantedMuLaN(), items)
    swapped = {"flute": "cello", "cello": "organ", "organ": "flute"}
    other = embed_clips(PlantedMuLaN(), planted_items(tmp_path, swapped))
    pixels = []
    for name, shown, label in (("a", clips, None), ("b", other, None), ("c", clips, "tempo")):
        path = tmp_path / "new" / f"{name}.png"
        plot_similarities(*ordered_similarities(shown, label), path, "broken \udcff $title")
        pixels.append(torch.from_numpy(imread(path)[..., :3].copy()))
    assert min(pixels[0].shape[:2]) > 600 and pixels[0].std() > 0.05
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["nothing", "labels", "captions"])
def test_the_plot_of_unusual_manifests(tmp_path, lacking):
    """Names that look like formulas, many classes, clips without a class; no labels; no captions."""
    imread = pytest.importorskip("matplotlib.image").imread
    items = planted_items(tmp_path, copies=4)
    odd = {"$x_{": [f"$a_{{ {number % 22}" if number > 2 else None for number in range(len(items))]}
    changes = {
        "nothing": [{"labels": {name: values[number] for name, values in odd.items()}} for number in range(len(items))],
        "labels": [{"labels": {}}] * len(items),
        "captions": [{"caption": None}] * len(items),
    }
    clips = embed_clips(PlantedMuLaN(), [replace(item, **own) for item, own in zip(items, changes[lacking])])
    plot_similarities(*ordered_similarities(clips), tmp_path / "odd.png", "title")
    assert imread(tmp_path / "odd.png")[..., :3].std() > 0.02
