"""The optional steps of the pipeline: an embedder, and stages that are trained on with melodies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from audiolm_pytorch.saving.files import read_json
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.steps import MELODY_STEPS, STEPS
from tests.helpers.micro import MICRO
from tests.helpers.tiny_mulan import tones


def _write_notes(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["pitch_class"] = [[0.0, 0.5, "ACEG"[number % 4]], [0.5, 1.0, "FCAD"[number % 3]]]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_melody_steps_extend_a_finished_run(micro_run: Path, micro_data: Path, tmp_path: Path) -> None:
    """The model of the run then has a melody; the steps before are not repeated, and the model without is replaced."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(micro_data, data)
    shutil.copytree(micro_run, out)
    pipeline = Pipeline(MICRO, data=data, out=out)
    with pytest.raises(ValueError, match="melody-semantic needs the result of melody"):
        list(pipeline.run("melody-semantic"))
    with pytest.raises(ValueError, match="none of 9 files has notes in the label pitch_class"):
        list(pipeline.run("melody"))
    _write_notes(data)
    pipeline = Pipeline(MICRO, data=data, out=out, allow_changed=("data",))
    for step in MELODY_STEPS:
        assert [report.step for report in pipeline.run(step)][-1] == step
        assert (out / step / "model" / "model.safetensors").is_file()
        assert not (out / step / "checkpoint").exists() and not (out / step / step.removeprefix("melody-")).exists()
    plain, model = MusicLM.from_pretrained(micro_run / "model"), MusicLM.from_pretrained(out / "model")
    assert model.melody_embedder is not None and plain.melody_embedder is None
    for name in ("semantic", "coarse"):
        stage = model.audio_lm.stages[name]
        assert stage.token_fingerprints["melody"] == model.melody_embedder.fingerprint()
        assert stage.fuser.entries["melody"].projection.weight.any()
        known = plain.audio_lm.stages[name].token_fingerprints
        assert known.items() < stage.token_fingerprints.items()
    request = {"num_samples": 1, "seconds": 0.6, "seed": 0}
    with_melody = model("a low tone", melody=tones(440, 550, seconds=0.3).flatten(), melody_sample_hz=8000, **request)
    assert with_melody.shape == model("a low tone", **request).shape and with_melody.isfinite().all()
    before = read_json(out / "model" / "musiclm.json")
    assert set(before["made_from"]) == {*STEPS, *MELODY_STEPS}
    assert {report.summary for report in pipeline.run()} == {"done before"}
    assert read_json(out / "model" / "musiclm.json") == before


@pytest.mark.slow
def test_a_finished_model_learns_melodies_and_is_trained_further(
    micro_run: Path, micro_data: Path, tmp_path: Path, musiclm_command: Callable[..., int], caplog
) -> None:
    """`--from MODEL` adds melodies without the run of the model; the new model keeps them in a training without."""
    data, out, further = tmp_path / "data", tmp_path / "run", tmp_path / "further"
    shutil.copytree(micro_data, data)
    _write_notes(data)
    options = ["--preset", "micro", "--data", data]
    for step in MELODY_STEPS:
        assert musiclm_command("train", step, *options, "--from", micro_run / "model", "--out", out) == 0
    plain, model = MusicLM.from_pretrained(micro_run / "model"), MusicLM.from_pretrained(out / "model")
    assert plain.melody_embedder is None and model.melody_embedder is not None
    assert model.audio_lm.sampling == plain.audio_lm.sampling
    stages = model.audio_lm.stages
    assert [name for name, stage in stages.items() if stage.further_conditions] == ["semantic", "coarse"]
    assert musiclm_command("train", "coarse", *options, "--from", out / "model", "--out", further) == 0
    assert "the data lack ['melody']; the coarse transformer is trained without" in caplog.text
    last = MusicLM.from_pretrained(further / "model")
    assert last.melody_embedder.fingerprint() == model.melody_embedder.fingerprint()
    before, after = (one.audio_lm.stages["coarse"].state_dict() for one in (model, last))
    assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)
    melody = {"melody": tones(440, 550, seconds=0.3).flatten(), "melody_sample_hz": 8000}
    assert last("a low tone", num_samples=1, seconds=0.6, seed=0, **melody).isfinite().all()
