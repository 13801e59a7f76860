"""Distances of models to held-out clips, and their differences."""

import json
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch import MusicLM
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor
from musiclm_pytorch.evaluation.metrics.frechet import FrechetDistance
from musiclm_pytorch.evaluation.metrics.kernel import KernelDistance
from musiclm_pytorch.recipes.metrics.distances import distance_difference, main


class Given(Extractor):
    """The features are given."""

    name, sample_hz = "given", 16_000

    def __call__(self, waves: torch.Tensor) -> torch.Tensor:
        return waves


def clip_set(name: str, rows: torch.Tensor) -> ClipSet:
    return ClipSet(name, [AudioItem(Path(name), None, {}, 16_000, 16_000)] * len(rows), {"given": list(rows)})


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_difference_equals_that_of_the_distances_and_is_narrower_for_similar_sets(kind):
    """Zero for equal sets; the interval of a pair is narrower than that of one distance."""
    torch.manual_seed(0)
    real, near = torch.randn(60, 3), torch.randn(60, 3) + 0.3
    far = near + 0.2 + 0.1 * torch.randn(60, 3)
    metric = kind(Given())
    sets = {name: clip_set(name, rows) for name, rows in {"real": real, "near": near, "far": far}.items()}
    one, two = (metric.measure(sets[name], sets["real"], None)[0] for name in ("near", "far"))
    difference = distance_difference(metric, sets["near"], sets["far"], sets["real"])
    assert difference.name == f"{metric.name} / far minus near"
    assert difference.value == pytest.approx(two.value - one.value)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.high - difference.low < two.high - two.low
    same = distance_difference(metric, sets["near"], sets["near"], sets["real"])
    assert same.value == same.low == same.high == 0


@pytest.mark.slow
def test_command_measures_two_models_on_the_same_clips(tmp_path, capsys):
    """Codec copies, both models and their difference are in the table, the hashes of the models in the JSON."""
    rows = []
    for number in range(4):
        wave = 0.2 * torch.sin(torch.arange(64_000) * (0.05 + 0.02 * number))[None]
        write_audio(tmp_path / f"{number}.wav", wave, 16_000)
        rows.append(json.dumps({"audio": f"{number}.wav", "caption": "a slow waltz on the flute"}))
    (tmp_path / "train.jsonl").write_text("no manifest", encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    MusicLM.from_pretrained("tiny").save_pretrained(tmp_path / "same")
    main(("tiny", str(tmp_path / "same")), tmp_path, tmp_path / "out.json", seconds=4.0, num_samples=1)
    table = capsys.readouterr().out
    assert "codec copies of tiny" in table and "two halves" in table
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(set(report["settings"]["models"].values())) == 1
    differences = [value for value in report["metrics"] if " minus " in value["name"]]
    assert len(differences) == 4 and not any(value["value"] for value in differences)
    with pytest.raises(ValueError, match="at least 4 clips with captions are needed, got 4 in .* and --limit 3"):
        main(("tiny",), tmp_path / "valid.jsonl", limit=3)
    with pytest.raises(ValueError, match="several different ones, got .'tiny', 'tiny'."):
        main(("tiny", "tiny"), tmp_path)
