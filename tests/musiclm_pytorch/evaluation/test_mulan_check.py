import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from musiclm_pytorch.evaluation.mulan_check import (
    check_metrics,
    check_mulan,
    embed_items,
    held_out_items,
    modality_gap,
    top_clip_metrics,
    values_of_texts,
)
from musiclm_pytorch.evaluation.mulan_report import mulan_tables
from musiclm_pytorch.evaluation.mulan_views import (
    draw_latents,
    draw_similarities,
    gap_plane,
    label_named,
    principal_plane,
    sorted_clips,
)
from musiclm_pytorch.evaluation.tagging import TagTest
from tests.helpers.planted_mulan import PlantedMuLaN, planted_items


def metrics_of(check) -> dict:
    return {metric.name: metric for metric in check_metrics(check)}


def test_a_model_that_understands_everything_has_full_marks(tmp_path):
    """Every measure at its best, each beside chance, with an interval that holds it."""
    metrics = metrics_of(check_mulan(PlantedMuLaN(), planted_items(tmp_path)))
    for direction in ("text to audio", "audio to text"):
        assert metrics[f"retrieval / {direction} / R@1"].value == metrics[f"retrieval / {direction} / mAP"].value == 1
        assert metrics[f"retrieval / {direction} / R@1"].chance == pytest.approx(1 / 12)
        assert metrics[f"retrieval / {direction} / R@1"].count == 12
    for label, classes in (("instrument", 3), ("tempo", 2), ("drums", 2)):
        assert metrics[f"tagging / {label} / AUC"].value == metrics[f"tagging / {label} / balanced accuracy"].value == 1
        assert metrics[f"tagging / {label} / AUC"].chance == 0.5
        assert metrics[f"tagging / {label} / balanced accuracy"].chance == pytest.approx(1 / classes)
        assert metrics[f"top clip / {label} / accuracy"].value == 1
        assert metrics[f"top clip / {label} / balanced accuracy"].chance == pytest.approx(1 / classes)
    assert not any("bpm" in name for name in metrics)
    assert metrics["latents / cosine of a text and its clips"].value == pytest.approx(1, abs=1e-6)
    assert metrics["latents / modality gap"].value == pytest.approx(0, abs=1e-6)
    assert all(metric.low <= metric.value + 1e-9 and metric.value <= metric.high + 1e-9 for metric in metrics.values())


def test_a_model_that_confuses_instruments_fails_there_alone(tmp_path):
    """Flute, cello and organ sound like each other in turn: nothing is found by instrument, all by tempo and drums."""
    heard = {"flute": "cello", "cello": "organ", "organ": "flute"}
    metrics = metrics_of(check_mulan(PlantedMuLaN(), planted_items(tmp_path, heard)))
    assert metrics["retrieval / text to audio / R@1"].value == metrics["retrieval / audio to text / R@1"].value == 0
    assert metrics["tagging / instrument / AUC"].value < 0.5 and metrics["tagging / tempo / AUC"].value == 1
    for label, accuracy in (("instrument", 0), ("tempo", 1), ("drums", 1)):
        assert metrics[f"tagging / {label} / balanced accuracy"].value == accuracy
        assert metrics[f"top clip / {label} / balanced accuracy"].value == accuracy


def test_captions_of_several_clips_are_asked_once_and_any_clip_is_right(tmp_path):
    """Two clips of every caption: twelve questions of two right answers, and twelve answers, of which one is right."""
    check = check_mulan(PlantedMuLaN(), planted_items(tmp_path, copies=2))
    assert check.relevant.shape == (12, 24) and check.relevant.sum(dim=1).tolist() == [2] * 12
    metrics = metrics_of(check)
    found, back = (metrics[f"retrieval / {way} / R@1"] for way in ("text to audio", "audio to text"))
    assert (found.value, found.count, back.value, back.count) == (1, 12, 1, 24)
    assert found.chance == pytest.approx(2 / 24) and back.chance == pytest.approx(1 / 12)


def test_clips_without_captions_are_found_by_mistake_only(tmp_path):
    """They take part in the search and in tagging, but ask nothing; several captions of a clip all ask."""
    items = planted_items(tmp_path)
    items[0] = replace(items[0], caption=None)
    items[1] = replace(items[1], labels={**items[1].labels, "captions": ["slow flute without drums at all", " "]})
    check = check_mulan(PlantedMuLaN(), items)
    assert check.relevant.shape == (12, 12) and check.relevant[:, 0].sum() == 0 and check.relevant[:, 1].sum() == 2
    metrics = metrics_of(check)
    assert metrics["retrieval / audio to text / R@1"].count == 11
    assert metrics["tagging / instrument / AUC"].count == 12


def test_labels_alone_are_enough(tmp_path):
    """Without captions the prompts of the first label are searched for; without labels there is only retrieval."""
    items = [replace(item, caption=None) for item in planted_items(tmp_path)]
    check = check_mulan(PlantedMuLaN(), items)
    assert check.texts == ["cello", "flute", "organ"] and not check.are_captions
    metrics = metrics_of(check)
    assert metrics["retrieval / text to audio / mAP"].value == metrics["tagging / tempo / AUC"].value == 1
    assert not any(name.startswith("top clip") for name in metrics)
    assert "## Top clip" not in mulan_tables(list(metrics.values()))
    bare = [replace(item, labels={}) for item in planted_items(tmp_path)]
    names = {name.split(" / ")[0] for name in metrics_of(check_mulan(PlantedMuLaN(), bare))}
    assert names == {"retrieval", "latents"}
    with pytest.raises(ValueError, match="neither two different captions nor a label"):
        check_mulan(PlantedMuLaN(), [replace(item, caption="the same") for item in bare])


def test_latents_do_not_depend_on_the_batch(tmp_path):
    """Clips of unequal lengths keep their places, in any batch."""
    items = planted_items(tmp_path)
    latents = embed_items(PlantedMuLaN(), items[::-1], batch_size=5)
    assert torch.allclose(latents.flip(0), embed_items(PlantedMuLaN(), items, batch_size=1), atol=1e-6)


def test_a_broken_model_is_named(tmp_path):
    """NaN is an error, not a metric."""
    items = planted_items(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity for texts"):
        check_mulan(PlantedMuLaN(gap=math.nan), items)


def test_the_gap_is_the_distance_of_the_means(tmp_path):
    """A planted offset of texts is found, in the metric and along the line of the picture."""
    check = check_mulan(PlantedMuLaN(gap=2.0), planted_items(tmp_path))
    expected = float((check.audio.mean(0) - check.text.mean(0)).norm())
    assert metrics_of(check)["latents / modality gap"].value == pytest.approx(expected) and expected > 0.7
    along = gap_plane(check.audio, check.text)[:, 0]
    assert float(along[12:].mean() - along[:12].mean()) == pytest.approx(modality_gap(check.audio, check.text))
    assert float(along[12:].mean() + along[:12].mean()) == pytest.approx(0, abs=1e-6)


def test_the_gap_in_the_table_is_that_in_the_picture(tmp_path):
    """All clips and all texts count, also where clips share texts, have none, or are described by prompts alone."""
    items = planted_items(tmp_path, copies=2)
    few = [replace(item, caption=("slow flute", "fast cello", None)[index % 3]) for index, item in enumerate(items)]
    for chosen in (few, [replace(item, caption=None) for item in items]):
        check = check_mulan(PlantedMuLaN(gap=1.0), chosen)
        metric = next(metric for metric in check_metrics(check) if metric.name == "latents / modality gap")
        assert metric.value == pytest.approx(modality_gap(check.audio, check.text), abs=1e-6)


def test_texts_say_what_all_their_clips_are():
    """A text of clips that differ, of unknown ones or of none says nothing."""
    truth = torch.tensor([0, 0, 1, -1])
    relevant = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert values_of_texts(truth, relevant).tolist() == [0, -1, 1, -1, -1]


def test_top_clips_beside_those_chosen_at_random():
    """Chance of the plain share is that of random clips; a clip of unknown class is wrong; balance weighs classes."""
    test = TagTest("tempo", ("fast", "slow"), ("fast", "slow"), torch.tensor([0, 0, 0, 1, -1]))
    relevant = torch.eye(5).bool()[:4]
    top = torch.tensor([0, 1, 4, 0])
    similarities = torch.nn.functional.one_hot(top, 5).float()
    plain, balanced = top_clip_metrics("t", similarities, relevant, [test])
    assert (plain.name, plain.value, plain.count) == ("t / tempo / accuracy", 0.5, 4)
    assert plain.chance == pytest.approx((3 * 3 / 5 + 1 / 5) / 4)
    assert balanced.value == pytest.approx((2 / 3 + 0) / 2) and balanced.chance == pytest.approx((3 / 5 + 1 / 5) / 2)
    assert top_clip_metrics("t", similarities[:3], relevant[:3], [test]) == []


def test_items_of_a_folder_are_the_held_out_ones(tmp_path):
    """valid.jsonl decides; a limit chooses by seed, in order; a limit below two is refused."""
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


def test_tables_hold_every_metric(tmp_path):
    """Shares in percent with intervals, chance below, ranks and cosines as they are."""
    heard = {"flute": "cello", "cello": "organ", "organ": "flute"}
    text = mulan_tables(check_metrics(check_mulan(PlantedMuLaN(), planted_items(tmp_path, heard))))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "n", "R@1", "R@5", "R@10", "median rank", "mAP"]
    assert ["guessing", "", "8.3", "41.7", "83.3", "6.5", "25.9"] in rows
    assert ["tempo", "12", "2 classes", "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]"] in rows
    assert ["instrument", "12", "3 classes", "0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]"] in rows
    assert ["guessing", "", "", "33.3", "33.3"] in rows
    assert any(row[0] == "modality gap" for row in rows)


def test_clips_are_ordered_by_one_label_and_then_the_others():
    """The label asked for comes first, unknown classes last, and the manifest decides what is left."""
    tests = [
        TagTest("a", ("x", "y"), ("x", "y"), torch.tensor([1, 0, 1, 0, -1])),
        TagTest("b", ("x", "y"), ("x", "y"), torch.tensor([0, 1, 0, 0, 0])),
    ]
    assert sorted_clips(tests, tests[0], 5) == [3, 1, 0, 2, 4]
    assert sorted_clips(tests, tests[1], 5) == [3, 0, 2, 4, 1]
    assert sorted_clips([], None, 3) == [0, 1, 2]
    assert (
        label_named(tests, None) is tests[0] and label_named(tests, "b") is tests[1] and label_named([], None) is None
    )
    with pytest.raises(ValueError, match="no label 'c'.* there are: a, b"):
        label_named(tests, "c")


def test_the_plane_is_that_of_scikit_learn():
    """Coordinates and shares of the variance, up to the sign of an axis."""
    from sklearn.decomposition import PCA

    vectors = torch.randn(40, 6) * torch.tensor([3.0, 1.0, 2.0, 0.5, 0.1, 0.1]) + 5
    oracle = PCA(2).fit(vectors.double().numpy())
    points, shares = principal_plane(vectors)
    assert np.allclose(points.abs(), np.abs(oracle.transform(vectors.double().numpy())), atol=1e-6)
    assert shares == pytest.approx(oracle.explained_variance_ratio_.tolist())
    assert torch.equal(principal_plane(vectors)[0], points)


def picture(path: Path) -> torch.Tensor:
    """Pixels `[h, w, 3]` of a picture."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(path)[..., :3].copy())


@pytest.mark.parametrize("draw", [draw_similarities, draw_latents])
def test_pictures_show_what_is_measured(tmp_path, draw):
    """Pictures of a model that understands and of one that does not differ, and so do those by another label."""
    pytest.importorskip("matplotlib")
    check = check_mulan(PlantedMuLaN(gap=1.0), planted_items(tmp_path))
    heard = {"flute": "cello", "cello": "organ", "organ": "flute"}
    other = check_mulan(PlantedMuLaN(), planted_items(tmp_path, heard))
    pixels = []
    for name, shown, label in (("a", check, None), ("b", other, None), ("c", check, "tempo")):
        draw(shown, tmp_path / "new" / f"{name}.png", "broken \udcff $title", label)
        pixels.append(picture(tmp_path / "new" / f"{name}.png"))
    assert min(pixels[0].shape[:2]) > 600 and pixels[0].std() > 0.05
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("draw", [draw_similarities, draw_latents])
@pytest.mark.parametrize("lacking", ["nothing", "labels", "captions"])
def test_pictures_of_anything(tmp_path, draw, lacking):
    """Names that look like formulas, more classes than colours, clips without a class; no labels; no captions."""
    pytest.importorskip("matplotlib")
    items = planted_items(tmp_path, copies=4)
    odd = {"$x_{": [f"$a_{{ {number % 22}" if number > 2 else None for number in range(len(items))]}
    changes = {
        "nothing": [{"labels": {name: values[number] for name, values in odd.items()}} for number in range(len(items))],
        "labels": [{"labels": {}}] * len(items),
        "captions": [{"caption": None}] * len(items),
    }
    check = check_mulan(PlantedMuLaN(), [replace(item, **own) for item, own in zip(items, changes[lacking])])
    draw(check, tmp_path / "odd.png", "title")
    assert picture(tmp_path / "odd.png").std() > 0.02
