"""Batches from worker processes: the same bits as without, the same errors, and no process that stays."""

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch.codecs.training.denoising import NoiseMixer
from audiolm_pytorch.data.batches import BatchPlan, collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.lm.training_data import WaveBatch
from audiolm_pytorch.training import TrainLoop
from audiolm_pytorch.training.loading import loaded_batches
from audiolm_pytorch.training.run_folder import claimed_folder
from musiclm_pytorch.musicgen.augmentation import Mixing
from tests.helpers.toy_training import SETTINGS, ToyTask, assert_same_run

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness is promised on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def load(read: Callable[[list[tuple[int, int]]], Any], numbers: range, num_workers: int, num_items: int) -> list[Any]:
    """Load batches of three items with this number of workers."""
    with loaded_batches(read, BatchPlan(num_items, 3, seed=5), numbers, num_workers) as batches:
        return list(batches)


def test_batches_do_not_depend_on_the_workers() -> None:
    """Random numbers of every kind depend on the number of the batch alone, wherever the loading begins."""
    task = ToyTask()
    straight = load(task.batch, range(8), 0, task.num_items)
    assert len({batch.sum().item() for batch in straight}) == 8
    torch.manual_seed(9)
    np.random.seed(9)
    for num_workers in (1, 2):
        again = load(task.batch, range(3, 8), num_workers, task.num_items)
        assert all(torch.equal(one, other) for one, other in zip(straight[3:], again, strict=True))


def test_crops_noise_and_mixtures_do_not_depend_on_workers_and_threads(write_folder: Callable[..., Path]) -> None:
    """Guards sums over a wave, whose last bits would depend on the threads; the workers fill one cache of files."""
    items = load_items(write_folder(seconds=4.0, sample_hz=44100)).items

    def read(crops: CropDataset, pairs: list[tuple[int, int]]) -> Any:
        mixer = NoiseMixer(crops, crops, sample_hz=24000, clean_share=0.0)
        clips = collate_crops([crops.get(*pair) for pair in pairs])
        batch = WaveBatch(clips, [None] * len(pairs), [{}] * len(pairs), torch.tensor([0]))
        mixed = Mixing(probability=1.0)(batch, np.random.default_rng(pairs[0]))
        return [mixer.get(*pair).wave for pair in pairs], mixed.crops.waves[24000]

    threads, results, filled = torch.get_num_threads(), [], []
    try:
        for num_workers in (0, 2):
            torch.set_num_threads(3)
            crops = CropDataset(items, None, [24000])
            results.append(load(lambda pairs, crops=crops: read(crops, pairs), range(4), num_workers, len(items)))
            filled.append((crops._scales > 0).all())
    finally:
        torch.set_num_threads(threads)
    assert all(filled)
    for (waves, mixed), (waves_of_workers, mixed_of_workers) in zip(*results, strict=True):
        assert all(torch.equal(*pair) for pair in zip(waves, waves_of_workers, strict=True))
        assert torch.equal(mixed, mixed_of_workers)


@pytest.mark.slow
def test_a_run_may_change_its_workers(tmp_path: Path) -> None:
    """Resumed with other workers, bit for bit the run without workers; none of them is left."""
    settings = replace(SETTINGS, grad_accum_every=2)
    TrainLoop(ToyTask(), settings, tmp_path / "straight").train()
    for num_workers, steps in ((0, 3), (2, 4), (1, None)):
        loop = TrainLoop(ToyTask(seed=num_workers), replace(settings, num_workers=num_workers), tmp_path / "run")
        loop.train(stop_after_steps=steps)
        assert not multiprocessing.active_children()
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_worker_is_that_of_the_training(tmp_path: Path, num_workers: int) -> None:
    """Same class, same line, at the same step, also if the class cannot be pickled; the run can go on afterwards."""

    class OwnError(ValueError):
        def __init__(self, file: str, reason: str) -> None:
            super().__init__(f"{file}: {reason}")

    task = ToyTask()
    read, settings = task.batch, replace(SETTINGS, num_workers=num_workers, checkpoint_every_steps=1)
    plan = BatchPlan(task.num_items, settings.batch_size, settings.seed)
    steps = [plan.indices(step) for step in range(settings.num_train_steps)]
    broken: dict[int, Exception] = {4: ValueError("/data/song.mp3: is broken")}

    def batch(pairs: list[tuple[int, int]]) -> Any:
        if error := broken.get(steps.index(pairs)):
            raise error
        return read(pairs)

    task.batch = batch  # type: ignore[method-assign]
    loop = TrainLoop(task, settings, tmp_path)
    with pytest.raises(ValueError) as raised:
        loop.train()
    assert raised.value.args == ("/data/song.mp3: is broken",)
    assert num_workers == 0 or "in a worker process" in str(raised.value.__cause__)
    assert not multiprocessing.active_children()
    broken[4] = OwnError("/data/song.mp3", "is broken again")
    with pytest.raises(Exception, match="^(OwnError: )?/data/song.mp3: is broken again$"):
        loop.train()
    del broken[4]
    assert loop.train(stop_after_steps=1).step == 5


def start_run(folder: Path, seconds: float) -> int:
    """Train in a group of processes of its own, with two workers that need time for each batch; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            task = ToyTask(on_batch=lambda count: time.sleep(seconds if count > 1 else 0))
            TrainLoop(task, replace(SETTINGS, num_train_steps=900, num_workers=2), folder).train()
        except KeyboardInterrupt:
            status = 130
        except SystemExit as error:
            status = int(str(error))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    while not (folder / "metrics.jsonl").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    return child


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_all_processes_ends_the_run_with_a_checkpoint(tmp_path: Path, number: int, status: int) -> None:
    """Ctrl-C and the end of a job reach the workers too, which leave the answer to the training."""
    child = start_run(tmp_path, 0.02)
    os.killpg(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] > 0
    with pytest.raises(ProcessLookupError):
        os.killpg(child, 0)


@pytest.mark.slow
def test_batches_that_cannot_be_sent_are_an_error() -> None:
    """A batch with a local function would never arrive."""
    with pytest.raises(TypeError, match="batches must be picklable for worker processes.*pass num_workers=0"):
        load(lambda pairs: {"label": lambda: 0}, range(2), 1, 8)


@pytest.mark.slow
def test_a_worker_that_waits_ends_with_the_block() -> None:
    """A worker that reads from a network drive that does not answer, after an error in the training."""
    plan = BatchPlan(8, 2, 0)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="stop"):
        with loaded_batches(lambda pairs: time.sleep(60), plan, range(2), 1):
            raise RuntimeError("stop")
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock_to_its_workers(tmp_path: Path) -> None:
    """The next run can begin while workers of a killed one still load a batch."""
    child = start_run(tmp_path, 5.0)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.killpg(child, 0)  # the workers live
        with claimed_folder(tmp_path, {"checkpoint": ("step",)}):
            pass
    finally:
        os.killpg(child, signal.SIGKILL)
