"""The k-means job: its crops, its continuation after a kill, and its error messages."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from audiolm_pytorch.data import AudioItem, CropDataset, load_split
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.modules import load_module, read_config, register
from audiolm_pytorch.semantic import (
    ClusterUsage,
    FrameEncoder,
    KMeansFit,
    KMeansTokenizer,
    KMeansTrainer,
    features,
    kmeans_trainer,
)
from audiolm_pytorch.semantic.features import PlannedCrop, plan_crops
from audiolm_pytorch.training.checkpoint import CheckpointFolder
from tests.helpers.processes import run_python, run_two_processes

RATE_HZ, DIM = 1000, 20


@register
class SampleEncoder(FrameEncoder):
    """A `FrameEncoder` whose frames are the samples themselves, times one more than the layer."""

    sample_hz, downsample_factor, dim = RATE_HZ, DIM, DIM

    def __init__(self, depth: int = 3, gain: float = 1.0) -> None:
        super().__init__()
        self.config = {"depth": depth}
        self.depth = depth
        self.gain = nn.Parameter(torch.tensor(gain))
        self.calls: list[int] = []

    def num_frames(self, num_samples: int) -> int:
        if num_samples < DIM:
            raise ValueError(f"at least {DIM} samples are needed")
        return num_samples // DIM

    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        self.calls.append(len(wave))
        frames = wave[:, : wave.shape[1] // DIM * DIM].unflatten(1, (-1, DIM)) * self.gain * (1 + layer)
        counts = torch.full((len(wave),), wave.shape[1]) if lengths is None else lengths
        return frames, torch.arange(frames.shape[1]) < (counts // DIM).unsqueeze(1)

    def truncated(self, layer: int) -> "SampleEncoder":
        short = SampleEncoder(layer, self.gain.item())
        short.calls = self.calls
        return short


def write_sounds(folder: Path, seconds: list[float] | None = None) -> Path:
    """Files of frames around a few points."""
    random = np.random.default_rng(0)
    points = random.standard_normal((9, DIM))
    folder.mkdir(parents=True)
    for number, length in enumerate(seconds or [1.0] * 20):
        count = max(1, round(length * RATE_HZ / DIM))
        frames = points[random.integers(0, 9, count)] + 0.2 * random.standard_normal((count, DIM))
        wave = 0.1 * frames.reshape(-1)[: round(length * RATE_HZ)]
        soundfile.write(folder / f"{number:02d}.wav", wave, RATE_HZ, subtype="FLOAT")
    return folder


def items_of(folder: Path) -> list[AudioItem]:
    """All files of a folder."""
    infos = [(path, soundfile.info(path)) for path in sorted(folder.iterdir())]
    return [AudioItem(path, None, {}, info.samplerate, info.frames) for path, info in infos]


def job(audio: Path | None, out: Path, **changes) -> KMeansTrainer:
    """The job over all files of a folder."""
    settings = dict(encoder=SampleEncoder(), layer=2, num_clusters=12, results_folder=out, seconds=1.0)
    settings |= {} if audio is None else {"items": items_of(audio)}
    return KMeansTrainer(**{**settings, **changes})


def plan_of(items: list[AudioItem], max_frames: int, seed: int = 0) -> list[PlannedCrop]:
    """Crops of a second."""
    return plan_crops(SampleEncoder(), CropDataset(items, 1.0, (RATE_HZ,), seed), max_frames)


def result(fit: KMeansFit) -> tuple[bytes, ...]:
    """Every bit of what was fitted."""
    tokenizer = fit.tokenizer
    return (*(part.numpy().tobytes() for part in (tokenizer.centroids, tokenizer.mean, tokenizer.std)), str(fit.usage))


def listing(folder: Path) -> dict[str, int]:
    """Files below a folder with the times when they were written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def few_epochs():
    """Ten epochs, though the vectors are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_trainer, "_MIN_BATCHES", 1)
        yield


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("kmeans") / "audio")


@pytest.fixture(scope="module")
def straight(sounds) -> tuple[bytes, ...]:
    """Result of a run without interruption."""
    return result(job(sounds, sounds.parent / "straight").train())


@pytest.fixture
def small_chunks(monkeypatch):
    """Two crops are encoded at once and four go into a chunk; the state is written after every epoch."""
    monkeypatch.setattr(features, "_MAX_CROPS_PER_BATCH", 2)
    monkeypatch.setattr(features, "_CHUNK_BYTES", 4 * 50 * DIM * 4)
    monkeypatch.setattr(kmeans_trainer, "_SECONDS_BETWEEN_STATES", 0.0)


def test_the_fit_is_that_of_the_files(sounds, tmp_path):
    """Guards the way from files to tokens: statistics are those of all frames, every frame gets a near centroid."""
    fit = job(sounds, tmp_path).train()
    waves = np.stack([soundfile.read(path)[0] for path in sorted(sounds.iterdir())])
    frames = waves.reshape(-1, DIM) * 3
    tokenizer = fit.tokenizer
    np.testing.assert_allclose(tokenizer.mean, frames.mean(0), atol=1e-5)
    np.testing.assert_allclose(tokenizer.std, frames.std(0), rtol=1e-4)
    assert tokenizer.layer == tokenizer.encoder.depth == 2 and tokenizer.codebook_size == 12
    ids = tokenizer(torch.from_numpy(waves).float())
    centroids = (tokenizer.centroids * tokenizer.std + tokenizer.mean).numpy()[ids.flatten()]
    normalised = np.square((frames - centroids) / frames.std(0)).sum() / frames.size
    assert fit.usage.explained == pytest.approx(1 - normalised, abs=1e-4) and fit.usage.explained > 0.9
    assert fit.usage.num_tokens == len(frames) and fit.usage.used == len(ids.unique())


def test_what_is_saved_is_what_is_given(sounds, tmp_path):
    """Guards the folder: tokenizer and usage in it, the encoder left as it was, nothing of the global generators."""
    encoder = SampleEncoder().train()
    torch.manual_seed(3)
    np.random.seed(3)
    fit = job(sounds, tmp_path, encoder=encoder).train()
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert np.random.random() == np.random.RandomState(3).random()
    assert encoder.training and encoder.gain.requires_grad and encoder.depth == 3
    loaded = load_module(tmp_path / "tokenizer", KMeansTokenizer)
    assert loaded.fingerprint() == fit.tokenizer.fingerprint()
    assert ClusterUsage(**read_config(tmp_path / "tokenizer")["usage"]) == fit.usage
    record = read_json(tmp_path / "kmeans.json")
    assert record["usage"]["used"] == fit.usage.used and record["run"]["layer"] == 2


@pytest.mark.slow
def test_the_seed_decides(sounds, straight, tmp_path):
    """Guards determinism: the same seed gives the same bits wherever the files lie, another one others."""
    shutil.copytree(sounds, tmp_path / "moved")
    assert result(job(tmp_path / "moved", tmp_path / "same").train()) == straight
    assert result(job(sounds, tmp_path / "other", seed=1).train())[0] != straight[0]


class Interrupted(BaseException):
    """Not an `Exception`, so that no handler catches it, as for a kill."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "times"),
    [
        ("features.write_shards", 1),
        ("features._encode", 1),
        ("features._encode", 4),
        ("kmeans_trainer.vector_statistics", 1),
        ("kmeans_trainer.first_centroids", 1),
        ("kmeans_trainer.cluster_epoch", 1),
        ("kmeans_trainer.cluster_epoch", 3),
        ("kmeans_trainer.CheckpointFolder.write", 2),
        ("kmeans_trainer.save_module", 1),
        ("kmeans_trainer.write_json", 2),
    ],
)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_interrupted_anywhere_ends_at_the_same_bits(
    place, times, done, sounds, straight, tmp_path, monkeypatch, small_chunks
):
    """Guards resuming: stopped before or after any step and run again, the result is that of the straight run."""
    path = f"audiolm_pytorch.semantic.{place}"
    owner, _, name = path.rpartition(".")
    target = features if "features" in owner else kmeans_trainer
    for part in owner.split(".")[3:]:
        target = getattr(target, part)
    real, count = getattr(target, name), [0]

    def interrupting(*arguments, **named):
        count[0] += 1
        if count[0] == times and not done:
            raise Interrupted
        given = real(*arguments, **named)
        if count[0] == times:
            raise Interrupted
        return given

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(target, name, interrupting)
        job(sounds, tmp_path).train()
    before = job(sounds, tmp_path)
    assert before.is_finished == (place == "kmeans_trainer.write_json" and done)
    # The straight run encodes other groups of crops: to such an encoder they do not matter.
    assert result(before.train()) == straight


def test_what_is_done_is_not_done_again(sounds, tmp_path, monkeypatch, small_chunks):
    """Guards the point of resuming: whole chunks of features and epochs that are on disk are kept."""
    real, count = kmeans_trainer.cluster_epoch, [0]

    def counting(*arguments):
        count[0] += 1
        if count[0] == 5:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(kmeans_trainer, "cluster_epoch", counting)
    with pytest.raises(Interrupted):
        job(sounds, tmp_path).train()
    assert CheckpointFolder(tmp_path / "kmeans").read().step == 4
    shutil.rmtree(tmp_path / "features" / "chunk-00002")
    (tmp_path / "features" / "index.json").unlink()
    encoder = SampleEncoder()
    job(sounds, tmp_path, encoder=encoder).train()
    assert sum(encoder.calls) == 4
    assert CheckpointFolder(tmp_path / "kmeans").read().step == 10
    assert count[0] == 5 + 6


def test_a_finished_run_needs_nothing_but_its_result(sounds, straight, tmp_path, small_chunks):
    """Guards the end: found finished, nothing computed or written, with features and state removed by the user."""
    job(sounds, tmp_path).train()
    shutil.rmtree(tmp_path / "features")
    shutil.rmtree(tmp_path / "kmeans", ignore_errors=True)
    before, encoder = listing(tmp_path), SampleEncoder()
    again = job(sounds, tmp_path, encoder=encoder)
    assert again.is_finished and result(again.train()) == straight
    assert encoder.calls == [] and listing(tmp_path) == before


def test_a_folder_belongs_to_one_run(sounds, tmp_path):
    """Guards against mixing: every other setting is refused with the difference, finished or not."""
    shutil.copytree(sounds, tmp_path / "fewer")
    (tmp_path / "fewer" / "03.wav").unlink()
    out = tmp_path / "out"
    job(sounds, out).train()
    before = listing(out)
    for changes, message in [
        ({"layer": 1}, "layer: found 2, expected 1"),
        ({"num_clusters": 11}, "num_clusters: found 12, expected 11"),
        ({"seconds": 0.5}, r"seconds: found 1.0, expected 0.5"),
        ({"max_tokens": 600}, "max_tokens: found 1000000, expected 600"),
        ({"seed": 1}, "seed: found 0, expected 1"),
        ({"num_epochs": 3}, "num_epochs: found 10, expected 3"),
        ({"encoder": SampleEncoder(gain=2.0)}, "encoder: found [0-9a-f]{16}, expected [0-9a-f]{16}"),
        ({"items": items_of(tmp_path / "fewer")}, "data: found 20 files, .* expected 19 files"),
    ]:
        with pytest.raises(ValueError, match=message) as refused:
            job(sounds, out, **changes).train()
        assert "another folder" in str(refused.value) and "\n" not in str(refused.value)
    (out / "tokenizer" / "config.json").unlink()
    with pytest.raises(ValueError, match="layer: found 2, expected 1"):
        job(sounds, out, layer=1).train()
    assert listing(out) == {name: time for name, time in before.items() if name != "tokenizer/config.json"}


def test_a_folder_gives_its_training_part(tmp_path):
    """Guards held-out audio: a folder is split as every trainer splits it, and what is held out is not learnt from."""
    folder = write_sounds(tmp_path / "audio")
    train, valid = load_split(folder)
    assert valid and job(None, tmp_path / "out", folder=folder).num_tokens == 50 * len(train)
    (folder / "train.jsonl").write_text("".join(json.dumps({"audio": f"0{n}.wav"}) + "\n" for n in range(7)))
    (folder / "valid.jsonl").write_text(json.dumps({"audio": "11.wav"}))
    assert job(None, tmp_path / "out", folder=folder).num_tokens == 50 * 7


def test_crops_are_spread_over_the_files(tmp_path, caplog):
    """Guards the plan: all files before any of them again, long ones as often as they are long, exactly the frames."""
    items = items_of(write_sounds(tmp_path / "audio", [1.0, 3.5, 0.019, 0.5, 2.0]))
    plan = plan_of(items, 10_000)
    assert sorted(index for _, index, _ in plan) == [0, 1, 1, 1, 3, 4, 4]
    assert [crop.epoch for crop in plan] == sorted(crop.epoch for crop in plan)
    assert {crop.item: crop.num_frames for crop in plan} == {0: 50, 1: 50, 3: 25, 4: 50}
    assert "left out 1 of 5 files" in caplog.text and "02.wav" in caplog.text
    short = plan_of(items, 60)
    assert sum(crop.num_frames for crop in short) == 60
    assert [crop[:2] for crop in short] == [crop[:2] for crop in plan[: len(short)]]
    orders = {tuple(plan_of(items, 10_000, seed)) for seed in range(5)}
    assert len(orders) > 1


def test_features_of_unequal_crops_are_those_of_each_alone(tmp_path):
    """Guards batches of unequal crops: no padding among the features, the last crop cut where enough is there."""
    folder = write_sounds(tmp_path / "audio", [1.0, 0.31, 0.5, 0.02, 0.77, 1.0])
    trainer = job(folder, tmp_path / "out", num_clusters=2, max_tokens=150)
    fit = trainer.train()
    plan = plan_of(items_of(folder), 150)
    stored = TokenShards(tmp_path / "out" / "features")
    assert fit.usage.num_tokens == trainer.num_tokens == 150
    assert sum(len(stored[number]["features"]) for number in range(len(stored))) == 150
    for number, (_, index, count) in enumerate(plan):
        wave = soundfile.read(folder / f"{index:02d}.wav", dtype="float32")[0]
        frames = wave[: len(wave) // DIM * DIM].reshape(-1, DIM) * 3
        np.testing.assert_allclose(stored[number]["features"], frames[:count], rtol=1e-6)


def test_empty_clusters_are_warned_of(tmp_path, caplog):
    """Guards the warning: more than a tenth of the clusters without a vector, and only then."""
    (tmp_path / "audio").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", np.zeros(RATE_HZ), RATE_HZ)
    fit = job(tmp_path / "audio", tmp_path / "out", num_clusters=4).train()
    assert "3 of 4 clusters are empty" in caplog.text and fit.usage.used == 1
    assert fit.tokenizer(torch.zeros(1, 40)).shape == (1, 2)
    caplog.clear()
    job(write_sounds(tmp_path / "more"), tmp_path / "full").train()
    assert "empty" not in caplog.text


class Unregistered(SampleEncoder):
    """Could not be saved."""

    def truncated(self, layer: int) -> "Unregistered":
        return Unregistered(layer)


def test_bad_settings_are_refused_before_anything_is_written(sounds, tmp_path):
    """Error messages are one line with the input and the fix, and no folder is created."""
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for changes, message in [
        ({"layer": 4}, r"layer must be in 0\.\.3.*got 4"),
        ({"layer": -1}, r"layer must be in 0\.\.3.*got -1"),
        ({"num_clusters": 0}, "num_clusters"),
        ({"seconds": 0}, "seconds .* positive"),
        ({"seconds": 1e308}, r"seconds must be a finite number below 2\*\*64"),
        ({"seed": 2**70}, r"seed must be a finite number below 2\*\*64"),
        ({"seed": 2**40}, "seed .* below 2..32"),
        ({"seconds": float("nan")}, "seconds must be a number, got NaN"),
        ({"seed": -1}, "seed -1 at least 0"),
        ({"num_clusters": 2000}, "1000 tokens, too few for 2000 clusters; use more audio or fewer clusters"),
        ({"max_tokens": 11}, "11 tokens, too few for 12 clusters"),
        ({"items": None, "folder": tmp_path / "none"}, "no such folder"),
        ({"items": None, "folder": tmp_path / "empty"}, "the folder has no audio files"),
        ({"items": None}, "either a folder"),
        ({"folder": sounds}, "either a folder"),
        ({"items": []}, "empty list of training items"),
        ({"seconds": 0.01}, "crops of 0.01 s of all 20 files are shorter than a frame"),
    ]:
        with pytest.raises(ValueError, match=message) as refused:
            job(sounds, out, **changes)
        assert "\n" not in str(refused.value)
    with pytest.raises(TypeError, match="FrameEncoder"):
        job(sounds, out, encoder=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="registered"):
        job(sounds, out, encoder=Unregistered())
    assert not out.exists()


def test_broken_features_name_the_file(tmp_path, monkeypatch):
    """Guards against centroids of NaN, and against encoders that count wrongly."""
    folder = write_sounds(tmp_path / "audio", [1.0, 1.0, 1.0])
    broken = SampleEncoder(gain=float("inf"))
    with pytest.raises(ValueError, match=r"0\d.wav: layer 2 of the encoder returns NaN or infinity.*remove the file"):
        job(folder, tmp_path / "out", encoder=broken).train()
    monkeypatch.setattr(SampleEncoder, "num_frames", lambda self, num_samples: 51)
    with pytest.raises(
        ValueError, match=r"0\d.wav: layer 2 of SampleEncoder returns features of shape \(50, 20\), but .* \(51, 20\)"
    ):
        job(folder, tmp_path / "other").train()


@pytest.mark.slow
def test_killed_and_run_again_is_the_same(sounds, straight, tmp_path, small_chunks):
    """Guards against kill -9, which no clean-up survives: in a chunk, an epoch, the last save, a file."""
    for number, where in enumerate(("rename 2", "epoch 7", "save 1", "replace 9")):
        out = tmp_path / str(number)
        killed = run_python(__file__, sounds, out, where)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert not job(sounds, out).is_finished
        assert result(job(sounds, out).train()) == straight


@pytest.mark.slow
def test_two_processes_give_what_one_gives(sounds, straight, tmp_path):
    """Guards shared encoding: each process writes its chunks, the first one clusters, both end with the same bits."""
    done = run_two_processes(__file__, sounds, tmp_path, "report 0")
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["result"] == found[1]["result"] == repr(straight), done.stderr[-3000:]
    assert min(sum(one["calls"]) for one in found) >= 4 and sum(sum(one["calls"]) for one in found) == 20


def main(folder: Path, out: Path, where: str) -> None:
    """Run the job in small chunks and kill this process at the n-th time of something, or report what came out."""
    name, times = where.split()
    features._MAX_CROPS_PER_BATCH, features._CHUNK_BYTES = 2, 4 * 50 * DIM * 4
    kmeans_trainer._SECONDS_BETWEEN_STATES, kmeans_trainer._MIN_BATCHES = 0.0, 1
    left = [int(times)]

    def killing(owner, attribute):
        real = getattr(owner, attribute)

        def wrapped(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, attribute, wrapped)

    places = {
        "encode": (features, "_encode"),
        "rename": (Path, "rename"),
        "epoch": (kmeans_trainer, "cluster_epoch"),
        "save": (kmeans_trainer, "save_module"),
        "replace": (os, "replace"),
    }
    if name in places:
        killing(*places[name])
    encoder = SampleEncoder()
    fit = job(folder, out, encoder=encoder).train()
    rank = os.environ.get("RANK", "0")
    (out / f"rank{rank}.json").write_text(json.dumps({"result": repr(result(fit)), "calls": encoder.calls}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
