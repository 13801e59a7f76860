import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.saving.files import read_json, read_weights, write_json
from audiolm_pytorch.saving.modules import load_module
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.steps import STEPS
from musiclm_pytorch.pretrained.parts import PARTS
from tests.helpers import micro
from tests.helpers.bad_input import listing
from tests.helpers.micro import MICRO, write_clips

MODEL_FILES = [f"{part}/{file}" for part in PARTS for file in ("config.json", "model.safetensors")]


def content(folder: Path) -> dict[str, bytes]:
    """The files of an assembled model."""
    return {name: (folder / "model" / name).read_bytes() for name in MODEL_FILES}


def test_the_model_of_a_run_generates(micro_run):
    """Every step writes a report, and the model generates audio of the requested length."""
    for stage in STEPS:
        assert read_json(micro_run / stage / "report.json")["seconds"] > 0
    musiclm = MusicLM.from_pretrained(micro_run / "model")
    assert not musiclm.training
    found = musiclm(["a low tone", "a very high tone"], num_samples=2, seconds=0.7, seed=5, return_all=True)
    assert found.sample_hz == 16000 and found.waves.shape == (2, 2, 0.7 * 16000)
    assert found.waves.isfinite().all() and (found.waves.abs().amax(dim=-1) > 1e-3).all()
    assert found.waves.abs().max() < 1
    again = musiclm("a low tone", num_samples=1, seconds=0.7, seed=6)
    # rows of a matrix product may be rounded otherwise in another batch
    torch.testing.assert_close(again[0], found.waves[0, 1], atol=1e-4, rtol=0.0)
    assert not torch.equal(found.waves[0, 0], found.waves[0, 1])


def test_tokens_are_those_of_the_trained_parts(micro_run):
    """The stages learn tokens of the codec, tokenizer and MuLaN that are in the model."""
    shards = TokenShards(micro_run / "tokens" / "train")
    assert len(shards) == 9
    record = shards[0]
    assert record["semantic"].shape == (25,) and record["acoustic"].shape == (50, 3)
    assert record["latents"].shape == (1, 128) and record["duration_seconds"] == 1.0
    model = MusicLM.from_pretrained(micro_run / "model")
    assert shards.fingerprint["codec"] == model.audio_lm.codec.fingerprint()
    assert shards.fingerprint["semantic_tokenizer"] == model.audio_lm.wav2vec.fingerprint()


def test_stages_store_fingerprints(micro_run):
    """Checkpoints, results and the model have the fingerprints of the tokenizers and of the quantizer."""
    shards = TokenShards(micro_run / "tokens" / "train").fingerprint
    quantizer = load_module(micro_run / "quantizer" / "model").fingerprint()
    assert MusicLM.from_pretrained(micro_run / "model").mulan_embed_quantizer.fingerprint() == quantizer
    makers = {"semantic": shards["semantic_tokenizer"], "acoustic": shards["codec"]}
    for stage, kinds in {"semantic": ["semantic"], "coarse": ["semantic", "acoustic"], "fine": ["acoustic"]}.items():
        known = {**{kind: makers[kind] for kind in kinds}, "conditioner": quantizer}
        assert read_json(micro_run / stage / "finished.json")["run"]["token_fingerprints"] == known
        for folder in (micro_run / stage / "model", micro_run / "model" / stage):
            assert read_json(folder / "config.json")["config"]["token_fingerprints"] == known


def test_masked_prediction_is_logged_beside_chance(micro_run):
    """Every row of metrics has the chance level and the accuracy of the most frequent target."""
    lines = (micro_run / "semantic-tokenizer" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["phase"] for row in rows} == {"best_rq", "valid"}
    for row in rows:
        assert row["accuracy_chance"] == 1 / 64 and row["chance"] == pytest.approx(2 * math.log(64))
        assert 0 <= row["accuracy"] <= 1 and 1 / 64 < row["majority"] <= 1
    assert rows[-1]["step"] == 12


@pytest.mark.slow
def test_steps_one_by_one_and_in_another_order_give_the_same_model(micro_data, micro_run, tmp_path):
    """The weights depend on seed and data only, not on earlier steps of the process."""
    torch.rand(7)
    order = ["mulan", "quantizer", "semantic-tokenizer", "codec", "fine", "coarse", "semantic"]
    for stage in order:
        pipeline = Pipeline(MICRO, data=micro_data, out=tmp_path)
        assert not pipeline.is_complete
        reports = list(pipeline.run(stage))
        assert reports[-1].step == stage and pipeline.is_done(stage)
    assert pipeline.is_complete and content(tmp_path) == content(micro_run)


@pytest.mark.slow
def test_another_seed_gives_another_codec(micro_data, micro_run, tmp_path):
    """The seed changes the weights."""
    list(Pipeline(MICRO, data=micro_data, out=tmp_path, seed=1).run("codec"))
    result = "codec/model/model.safetensors"
    assert (tmp_path / result).read_bytes() != (micro_run / result).read_bytes()


@pytest.mark.slow
def test_finished_steps_are_not_repeated_and_lost_results_are_restored(micro_data, micro_run, tmp_path):
    """After a kill between training and its result, or before the assembly, the same result is written."""
    run = shutil.copytree(micro_run, tmp_path / "run")
    assert {report.summary for report in Pipeline(MICRO, data=micro_data, out=run).run()} == {"done before"}
    for stage in ("codec", "semantic-tokenizer", "coarse"):
        (run / stage / "model" / "model.safetensors").unlink()
    (run / "model" / "musiclm.json").unlink()
    (run / "coarse" / ".writing-123").mkdir()
    announced = []
    reports = list(Pipeline(MICRO, data=micro_data, out=run).run(announce=announced.append))
    assert announced == ["codec", "semantic-tokenizer", "coarse"]
    assert [report.step for report in reports] == list(STEPS)
    assert content(run) == content(micro_run)
    assert not (run / "coarse" / ".writing-123").exists()


@pytest.mark.slow
def test_wall_time_counts_all_sessions(micro_data, tmp_path, monkeypatch):
    """The time of a resumed step includes the earlier sessions."""
    run = tmp_path / "run"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pipeline, "_save", interrupted)
        next(Pipeline(MICRO, data=micro_data, out=run).run("codec"))
    finished = read_json(run / "codec" / "finished.json")
    write_json(run / "codec" / "finished.json", {**finished, "seconds": 3600.0})
    report = next(Pipeline(MICRO, data=micro_data, out=run).run("codec"))
    assert 3600 <= report.seconds < 3700


def test_a_run_keeps_no_training_files_and_few_copies_of_weights(micro_run):
    """A finished run has no checkpoint, a loss curve per trained step, and its weights in two files.

    Weights of MuLaN are also in the quantizer.
    """
    for step in ("codec", "semantic-tokenizer", "mulan", "semantic", "coarse", "fine"):
        names = {path.name for path in (micro_run / step).iterdir()}
        assert "metrics.jsonl" in names and not names & {"checkpoint", "checkpoint.previous", "features", "tokenizer"}
        assert step == "codec" or "<polyline" in (micro_run / step / "loss.svg").read_text()
    copies = Counter()
    for file in micro_run.rglob("*.safetensors"):
        for name, tensor in read_weights(file)[0].items():
            if (
                tensor.is_floating_point()
                and tensor.numel() >= 256
                and not name.startswith(("mulan.", "audio.", "text."))
            ):
                copies[tensor.half().numpy().tobytes()] += 1
    assert len(copies) > 20 and max(copies.values()) == 2


def test_a_run_has_music_of_the_whole_model(micro_run):
    """Music for captions of held-out files, and audio of the steps that have it; others have no empty folder."""
    waves = sorted((micro_run / "samples").glob("*.wav"))
    assert 1 <= len(waves) <= 3
    for wave in waves:
        assert soundfile.info(wave).duration == MICRO.semantic.run.seconds
        assert "tone" in wave.with_suffix(".txt").read_text()
    for step in ("codec", "mulan", "coarse", "fine"):
        assert list((micro_run / step / "samples").glob("*_step_0000012.wav")), step
    assert not any((micro_run / step / "samples").exists() for step in ("semantic", "semantic-tokenizer"))


def test_settings_of_a_run_change_on_request(micro_data, micro_run, tmp_path, caplog):
    """Finished steps stay, the new settings are stored, and the change is logged."""
    run = shutil.copytree(micro_run, tmp_path / "run")
    preset = replace(MICRO, fine=replace(MICRO.fine, run=replace(MICRO.fine.run, batch_size=3)))
    with pytest.raises(ValueError, match="--allow-changed preset.fine.run.batch_size"):
        list(Pipeline(preset, data=micro_data, out=run).run())
    changed = Pipeline(preset, data=micro_data, out=run, allow_changed=["batch_size"])
    assert {report.summary for report in changed.run()} == {"done before"}
    assert "preset.fine.run.batch_size: found 4, expected 3" in caplog.text
    assert {report.summary for report in Pipeline(preset, data=micro_data, out=run).run()} == {"done before"}


@pytest.mark.parametrize("name", ["codec/config.json", "model/musiclm.json", "notes.txt"])
def test_files_of_the_user_are_not_overwritten(micro_data, tmp_path, name):
    """A folder that has files, but no run, is refused before anything is written."""
    file = tmp_path / "project" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match="contains files that do not belong to a run"):
        list(Pipeline(MICRO, data=micro_data, out=tmp_path / "project").run())
    assert [path for path in (tmp_path / "project").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_folder_of_another_run_is_refused(micro_data, micro_run, tmp_path):
    """Other sizes, another seed or other files raise an error that shows the difference."""
    run = shutil.copytree(micro_run, tmp_path / "run")
    before = listing(run)
    others = {
        "seed: found 0, expected 2": Pipeline(MICRO, data=micro_data, out=run, seed=2),
        "preset.fine.depth: found 1, expected 2": Pipeline(
            replace(MICRO, fine=replace(MICRO.fine, depth=2)), data=micro_data, out=run
        ),
        "data: found 10 files, .* expected 8 files": Pipeline(MICRO, data=write_clips(tmp_path / "other", 8), out=run),
    }
    for difference, pipeline in others.items():
        with pytest.raises(ValueError, match=f"contains a run with other settings.*{difference}.*another folder"):
            list(pipeline.run())
    assert listing(run) == before


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000])
@pytest.mark.parametrize("file", ["run.json", "codec/report.json"])
def test_a_damaged_record_of_a_run_is_named(micro_data, micro_run, tmp_path, file, content):
    """A file that is not a JSON object raises a ValueError with its name; such a run.json is of no run."""
    shutil.copytree(micro_run, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content)
    message = f"{file} (must contain a JSON object|is not a JSON file)"
    if file == "run.json":
        message = "run.json is damaged or does not belong to a run of this kind; restore the file"
    with pytest.raises(ValueError, match=message):
        list(Pipeline(MICRO, data=micro_data, out=tmp_path / "run").run("codec"))


def test_a_run_inside_the_data_continues(tmp_path):
    """Music that a run writes into the data is no new training file."""
    data = write_clips(tmp_path / "data", 4, captions=False)
    before = Pipeline(MICRO, data=data, out=data / "run").items
    for name in ("samples", "codec/samples"):
        (data / "run" / name).mkdir(parents=True)
        shutil.copy(data / "00.wav", data / "run" / name / "1.wav")
    (data / "run" / "run.json").write_text('{"format_version": 1, "preset": {}}')
    (data / "run" / "codec" / "metrics.jsonl").write_text("{}")
    assert Pipeline(MICRO, data=data, out=data / "run").items == before


def test_corpus_may_move(micro_data, micro_run, tmp_path, monkeypatch):
    """The same files in another folder continue the run."""
    shutil.copytree(micro_run, tmp_path / "run")
    shutil.copytree(micro_data, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert {report.summary for report in Pipeline(MICRO, data="moved", out="run").run()} == {"done before"}


@pytest.mark.slow
def test_two_programs_do_not_share_a_folder(micro_data, tmp_path):
    """A second training in the same folder raises an error."""
    first = Pipeline(MICRO, data=micro_data, out=tmp_path).run()
    next(first)
    with pytest.raises(ValueError, match="in use by another training"):
        list(Pipeline(MICRO, data=micro_data, out=tmp_path).run())
    first.close()
    assert next(Pipeline(MICRO, data=micro_data, out=tmp_path).run()).summary == "done before"


def test_missing_input_is_reported_before_anything_is_written(micro_data, tmp_path):
    """A step without its input raises an error at the start, not after hours of training."""
    bare = write_clips(tmp_path / "bare", 4, captions=False)
    cases = {
        "all": "has no captions, but the step mulan needs them; write a.txt beside a.wav, or pass a",
        "mulan": "has no captions",
        "quantizer": "quantizer needs the result of mulan; first run musiclm train mulan",
        "fine": "first run musiclm train semantic-tokenizer",
        "tokens": "first",
        "fien": "there is no step 'fien'; pass all or one of: codec, .*, fine",
    }
    for stage, message in cases.items():
        with pytest.raises(ValueError, match=message):
            list(Pipeline(MICRO, data=bare, out=tmp_path / "out").run(stage))
    with pytest.raises(ValueError, match="seed must not be negative"):
        Pipeline(MICRO, data=micro_data, out=tmp_path / "out", seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; pass a folder"):
        Pipeline(MICRO, data=micro_data, out=tmp_path / "file")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mixed_and_damaged_files(tmp_path, caplog):
    """A 44.1 kHz stereo mp3 is used beside 24 kHz files; damaged, empty and short files are reported and skipped."""
    data = write_clips(tmp_path / "data", 4, captions=False)
    tone = np.sin(2 * np.pi * 330 * np.arange(2 * 44100) / 44100)
    soundfile.write(data / "stereo.mp3", np.stack([tone, -0.5 * tone], axis=1) * 0.3, 44100)
    (data / "corrupt.wav").write_bytes(b"RIFF, but not really")
    (data / "empty.flac").write_bytes(b"")
    soundfile.write(data / "short.wav", tone[:100], 44100)
    with caplog.at_level(logging.WARNING):
        pipeline = Pipeline(MICRO, data=data, out=tmp_path / "run")
        for stage in ("codec", "semantic-tokenizer"):
            list(pipeline.run(stage))
    assert pipeline.is_done("codec") and pipeline.is_done("semantic-tokenizer")
    items = [*pipeline.train_items, *pipeline.valid_items]
    assert {item.path.name for item in items} == {"00.wav", "01.wav", "02.wav", "03.wav", "stereo.mp3"}
    assert all(name in caplog.text for name in ("corrupt.wav", "empty.flac", "short.wav"))


@pytest.mark.slow
def test_a_single_file_is_enough(tmp_path):
    """One file is enough to train a model."""
    pipeline = Pipeline(MICRO, data=write_clips(tmp_path / "data", 1), out=tmp_path / "run")
    list(pipeline.run())
    assert MusicLM.from_pretrained(tmp_path / "run")("a low tone", seconds=0.5, num_samples=1, seed=0).isfinite().all()


@pytest.mark.slow
def test_kill_9_in_each_stage_and_the_same_command_again_give_the_same_weights(micro_data, micro_run, tmp_path):
    """A run that is killed in every step has the same weights, byte for byte, as an uninterrupted one."""
    words = ["train", "all", "--preset", "micro", "--data", str(micro_data), "--out", str(tmp_path / "run")]
    command = [sys.executable, str(Path(micro.__file__)), *words]
    # the kernels of another number of threads sum in another order
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for stage in STEPS:
        killed = subprocess.run(command, env={**environment, "MICRO_KILL": stage}, capture_output=True, timeout=600)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        here = Pipeline(MICRO, data=micro_data, out=tmp_path / "run")
        assert not here.is_done(stage)
        if (tmp_path / "run" / stage / "checkpoint").exists():
            assert read_json(tmp_path / "run" / stage / "checkpoint" / "state.json")["step"] == 6
    finished = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    assert finished.returncode == 0, finished.stderr.decode()
    assert content(tmp_path / "run") == content(micro_run)
    leftovers = [name for name in listing(tmp_path / "run") if ".writing-" in name or name.endswith(".partial")]
    assert leftovers == []


@pytest.mark.slow
def test_two_processes_train_all_steps(micro_data, tmp_path):
    """torchrun without a GPU trains all steps in one process group."""
    words = ["train", "all", "--preset", "micro", "--data", str(micro_data), "--out", str(tmp_path / "run")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [*launcher, str(Path(micro.__file__)), *words],
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=600,
    )
    # gloo sometimes aborts at exit, after all work is done: what counts is the files
    assert (tmp_path / "run" / "model" / "musiclm.json").is_file(), done.stderr.decode()[-3000:]
    wave = MusicLM.from_pretrained(tmp_path / "run" / "model")("a low tone", num_samples=1, seconds=0.5, seed=0)
    assert torch.isfinite(wave).all()


@pytest.mark.slow
def test_only_the_first_process_assembles(micro_data, micro_run, tmp_path, monkeypatch):
    """Another process neither writes the model nor removes the partial files of the first one."""
    run = shutil.copytree(micro_run, tmp_path / "run")
    (run / "model" / "musiclm.json").unlink()
    (run / "model" / "codec" / ".writing-abc").mkdir()
    before = listing(run)
    waits = []
    second = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: waits.append(listing(run)))
    monkeypatch.setattr(Pipeline, "accelerator", second)
    Pipeline(MICRO, data=micro_data, out=run).assemble()
    assert waits == [before, before] and listing(run) == before


@pytest.mark.slow
def test_result_of_another_tokenizer_is_refused(micro_data, micro_run, tmp_path):
    """A step whose input has changed since raises an error; a repeated step updates the model."""
    run = shutil.copytree(micro_run, tmp_path / "run")
    shutil.rmtree(run / "fine")
    pipeline = Pipeline(MICRO, data=micro_data, out=run)
    list(pipeline.run())
    assert content(run) == content(micro_run)
    weights = run / "codec" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(ValueError, match="the result of codec has changed since .*tokens was computed"):
        list(pipeline.run("fine"))
