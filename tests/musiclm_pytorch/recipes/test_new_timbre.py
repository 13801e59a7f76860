"""Recipe that teaches a model a new timbre."""

import json
from pathlib import Path

import pytest

from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.saving.files import read_json
from musiclm_pytorch.pipeline import pipeline
from musiclm_pytorch.recipes import new_timbre
from tests.helpers.installed_sounds import sounds_are_missing


@pytest.mark.slow
@pytest.mark.skipif(sounds_are_missing(), reason="needs fluidsynth with soundfonts")
def test_the_recipe_runs_from_clips_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one known instrument, and few short clips: data, two trainings, and shares of three models."""
    monkeypatch.setattr(new_timbre, "KNOWN", ("flute",))
    monkeypatch.setattr(new_timbre, "_SECONDS", 2.56)
    monkeypatch.setattr(new_timbre, "_CLASSIFIER_CLIPS", 2)
    monkeypatch.setattr(pipeline, "write_samples", lambda *_: None)  # saves time
    new_timbre.main(tmp_path, lora_rank=2, new_generations=1, known_generations=1, scale=0.01)
    assert len(load_items(tmp_path / "data" / "finetune" / "train.jsonl").items) == 2 * 30 + 5
    items = load_items(tmp_path / "data" / "lora" / "train.jsonl").items
    assert len(items) == 30 + 5 and "sitar" in str(items[0].caption) and "flute" in str(items[-1].caption)
    results = read_json(tmp_path / "results.json")
    assert list(results) == ["before", "finetune", "lora"] and set(results["lora"]) == {"sitar", "flute"}
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    assert (tmp_path / "lora" / "coarse" / "lora" / "adapter_model.safetensors").stat().st_size < 1e6
    assert json.loads((tmp_path / "finetune" / "model" / "musiclm.json").read_text())["sampling"]
