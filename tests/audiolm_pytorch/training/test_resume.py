"""A run that was interrupted and resumed is bit for bit the one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from audiolm_pytorch.data.batches import BatchPlan
from audiolm_pytorch.saving.files import read_weights
from audiolm_pytorch.training import LossOutput, TrainLoop, optimizer, run
from audiolm_pytorch.training.optimizer import PhaseOptimizer, learning_rate_at
from tests.helpers.quick import only_quick
from tests.helpers.toy_training import SETTINGS, Tiny, ToyTask, assert_same_run, rows_of, tensors_in


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness is promised on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "critic_from"), [(False, 0), (True, 0), (True, 7)])
def test_resumed_run_is_bit_for_bit_the_straight_one(tmp_path: Path, critic: bool, critic_from: int) -> None:
    """N steps equal k steps, a resume and the rest, from other initial weights and other global noise."""
    about: dict[str, Any] = dict(critic=critic, critic_from=critic_from)
    TrainLoop(ToyTask(**about), SETTINGS, tmp_path / "straight").train()
    for start in range(4):
        random.seed(start)
        np.random.seed(start)
        loop = TrainLoop(ToyTask(seed=0 if start == 0 else 100 + start, **about), SETTINGS, tmp_path / "resumed")
        result = loop.train(stop_after_steps=5 if start < 2 else 1) if start < 3 else loop.train()
    assert result.step == 12
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_same_loop_continues_in_memory(tmp_path: Path) -> None:
    """A second call of train on the same loop continues the run, with the same result."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    loop = TrainLoop(ToyTask(), SETTINGS, tmp_path / "parts")
    assert [loop.train(stop_after_steps=7).step, loop.train().step] == [7, 12]
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, 6, 11])
def test_exception_in_a_step_resumes_from_the_checkpoint(tmp_path: Path, when: int) -> None:
    """The state of a half-done step is dropped: the same loop object continues from the checkpoint."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    task = ToyTask()

    def fail(count: int) -> None:
        if count == when:
            raise KeyboardInterrupt

    task.on_batch = fail
    loop = TrainLoop(task, replace(SETTINGS, checkpoint_every_steps=2), tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    loop.train()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_first_checkpoint_is_of_step_0(tmp_path: Path) -> None:
    """The preparation is checkpointed, so that a run killed in its first step continues from the same weights."""

    def fail(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrainLoop(ToyTask(on_batch=fail), SETTINGS, tmp_path / "resumed").train()
    other = ToyTask(seed=9)
    other.before_training = lambda: pytest.fail("prepared twice")  # type: ignore[method-assign]
    TrainLoop(other, SETTINGS, tmp_path / "resumed").train()
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def script(folder: Path, pause_seconds: float) -> list[str]:
    """A program that trains the toy task, slowly."""
    source = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[3])]!r}\n"
        "from tests.helpers.toy_training import ToyTask\n"
        "from audiolm_pytorch.training import LoopSettings, TrainLoop\n"
        f"task = ToyTask(on_batch=lambda count: time.sleep({pause_seconds}))\n"
        "settings = LoopSettings(num_train_steps=60, batch_size=3, ema_decay=0.9, validate_every=7, log_every=4,"
        " checkpoint_every_steps=2)\n"
        f"TrainLoop(task, settings, {str(folder)!r}).train()\n"
    )
    return [sys.executable, "-c", source]


@pytest.mark.slow
def test_killed_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Several kill -9 at arbitrary instants do not change weights, optimizer, EMA and metrics."""
    subprocess.run(script(tmp_path / "straight", 0.0), check=True)
    folder, kills = tmp_path / "killed", 0
    for number in range(3):
        process = subprocess.Popen(script(folder, 0.03))
        reached = 8 * (number + 1)
        while process.poll() is None:
            rows = rows_of(folder) if (folder / "metrics.jsonl").exists() else []
            if rows and rows[-1]["step"] >= reached:
                time.sleep(0.017 * number)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    subprocess.run(script(folder, 0.0), check=True)
    assert kills == 3
    assert_same_run(tmp_path / "straight", folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_killed_in_a_step_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A child process dies by SIGKILL in the middle of a step."""
    settings = replace(SETTINGS, checkpoint_every_steps=3)
    child = os.fork()
    if child == 0:
        task = ToyTask(on_batch=lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == 8 else None)
        try:
            TrainLoop(task, settings, tmp_path / "killed").train()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert json.loads((tmp_path / "killed" / "checkpoint" / "state.json").read_text())["step"] == 6
    TrainLoop(ToyTask(seed=3), settings, tmp_path / "killed").train()
    TrainLoop(ToyTask(), settings, tmp_path / "straight").train()
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_codebooks_that_training_moves_resume_exactly(tmp_path: Path) -> None:
    """Buffers of vector-quantize-pytorch (k-means start, EMA codebooks, dead codes) are part of the checkpoint."""

    def task(seed: int) -> Tiny:
        torch.manual_seed(seed)
        vq = ResidualVQ(
            dim=4, codebook_size=4, num_quantizers=2, kmeans_init=True, threshold_ema_dead_code=1, quantize_dropout=True
        )
        module = nn.ModuleDict({"linear": nn.Linear(4, 4), "vq": vq})

        def loss(batch: Tensor, step: int) -> LossOutput:
            encoded = module["linear"](batch)[None]
            quantized, _, commit = module["vq"](encoded)
            return LossOutput((quantized[0] - batch).pow(2).mean() + commit.sum())

        return Tiny(module, loss)

    settings = replace(SETTINGS, batch_size=8)
    TrainLoop(task(0), settings, tmp_path / "straight").train()
    TrainLoop(task(0), settings, tmp_path / "resumed").train(stop_after_steps=4)
    TrainLoop(task(1), settings, tmp_path / "resumed").train()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    weights, _ = read_weights(tmp_path / "straight" / "checkpoint" / "model.safetensors")
    assert any("embed" in name for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "settings.seed: found 0, expected 1"),
        ({"batch_size": 4}, "settings.batch_size: found 3, expected 4"),
        ({"num_train_steps": 13}, "settings.num_train_steps: found 12, expected 13"),
        ({"ema_decay": None}, "settings.ema_decay: found 0.9, expected None"),
    ],
)
@pytest.mark.parametrize("steps", only_quick([2, 12], [2]))
def test_resuming_with_other_settings_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str, steps: int
) -> None:
    """Settings with an influence on the weights must not change, whether the run is finished or not."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=steps)
    files = tensors_in(tmp_path)
    with pytest.raises(ValueError, match=message):
        TrainLoop(ToyTask(), replace(SETTINGS, **change), tmp_path).train()
    assert tensors_in(tmp_path) == files


@pytest.mark.slow
def test_reporting_settings_may_change(tmp_path: Path) -> None:
    """The intervals of reports and checkpoints have no influence on the weights."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "resumed").train(stop_after_steps=5)
    other = replace(SETTINGS, log_every=1, validate_every=3, checkpoint_every_steps=1)
    TrainLoop(ToyTask(), other, tmp_path / "resumed").train()
    assert tensors_in(tmp_path / "straight") == tensors_in(tmp_path / "resumed")


def test_other_data_are_refused(tmp_path: Path) -> None:
    """A resumed run with another size of the data set would receive other items."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=1)
    task = ToyTask()
    task.num_items = 10
    with pytest.raises(ValueError, match="num_items: found 11, expected 10"):
        TrainLoop(task, SETTINGS, tmp_path).train()


def test_finished_run_trains_no_more(tmp_path: Path) -> None:
    """A call of train on a finished run returns its result and builds no batch, even without the checkpoint."""
    loop = TrainLoop(ToyTask(), SETTINGS, tmp_path)
    result = loop.train()
    assert loop.is_finished
    for path in (tmp_path / "checkpoint").iterdir():
        path.unlink()
    task = ToyTask()
    assert TrainLoop(task, SETTINGS, tmp_path).train() == result
    assert task.batches_made == 0


def test_tied_weights_are_trained_once_and_resume(tmp_path: Path) -> None:
    """Two names of one parameter: one optimizer entry, one average, one tensor in the file."""

    def task() -> Tiny:
        torch.manual_seed(0)
        module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        module["b"].weight = module["a"].weight
        return Tiny(module, lambda batch, step: LossOutput((module["b"](module["a"](batch)) - batch).pow(2).mean()))

    TrainLoop(task(), SETTINGS, tmp_path / "straight").train()
    TrainLoop(task(), SETTINGS, tmp_path / "resumed").train(stop_after_steps=5)
    final = TrainLoop(task(), SETTINGS, tmp_path / "resumed")
    final.train()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    module = final.final_module()
    assert module["a"].weight is module["b"].weight
    assert "b.weight" not in read_weights(tmp_path / "straight" / "checkpoint" / "model.safetensors")[0]


def test_metrics_file_survives_a_cut_line(tmp_path: Path) -> None:
    """After a kill during the writing of a row, the resumed run has every row once."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "cut").train(stop_after_steps=6)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "phase": "main", "loss": 1.0}\n{"step": 9, "pha')
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "cut").train()
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["noise", "data", "schedule", "optimizer"])
def test_state_missing_from_the_checkpoint_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Fault 8: noise, data position, schedule or moments that restart at a resume; the comparison detects each."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()

    def check(folder: Path, between: Callable[[], None] = lambda: None) -> None:
        TrainLoop(ToyTask(), SETTINGS, folder).train(stop_after_steps=5)
        between()
        TrainLoop(ToyTask(), SETTINGS, folder).train()
        assert_same_run(tmp_path / "straight", folder)

    check(tmp_path / "right")
    originals = {"noise": run.seed_rng, "data": BatchPlan.indices}
    forgetful = {
        "noise": (run, "seed_rng", lambda *position, device: torch.manual_seed(0)),
        "data": (BatchPlan, "indices", lambda plan, step: originals["data"](plan, max(0, step - 5))),
        "schedule": (optimizer, "learning_rate_at", lambda step, **rest: learning_rate_at(max(0, step - 5), **rest)),
        "optimizer": (PhaseOptimizer, "load_state", lambda phase, tensors, rest, is_changed: None),
    }

    with pytest.raises(AssertionError):
        check(tmp_path / "faulty", between=lambda: monkeypatch.setattr(*forgetful[fault]))


def test_another_batch_size_continues_with_the_next_item(tmp_path: Path) -> None:
    """No item is left out or repeated when a run continues with more or fewer items per step."""
    seen: list[tuple[int, int]] = []

    class Recording(ToyTask):
        def batch(self, indices: list[tuple[int, int]]) -> Tensor:
            seen.extend(indices)
            return super().batch(indices)

    allowed = ("batch_size", "grad_accum_every")
    for steps, changes in [(3, {}), (1, {}), (2, {"batch_size": 4, "grad_accum_every": 2}), (3, {"batch_size": 1})]:
        settings = replace(SETTINGS, allow_changed=allowed, **changes)
        TrainLoop(Recording(), settings, tmp_path).train(stop_after_steps=steps)
    one_by_one = BatchPlan(ToyTask.num_items, 1, SETTINGS.seed)
    assert seen == [pair for number in range(4 * 3 + 2 * 8 + 3) for pair in one_by_one.indices(number)]
