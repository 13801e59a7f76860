"""Optimizers and schedules of the settings: the same bits as the default, exact resume, and errors."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import (
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from audiolm_pytorch.training import LoopSettings, TrainLoop
from audiolm_pytorch.training.optimizer import learning_rate_at
from tests.helpers.quick import only_quick
from tests.helpers.toy_training import SETTINGS, ToyTask, assert_same_run, linear_task, rows_of

# SETTINGS without what belongs to the default optimizer and schedule
PLAIN = LoopSettings(num_train_steps=12, batch_size=3, ema_decay=0.9, validate_every=5, log_every=4)
DEFAULT_ADAMW = partial(AdamW, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness is promised on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


class PythonState(Optimizer):
    """Gradient descent whose rate falls with a count per parameter that is a Python number."""

    def __init__(self, params: Any, lr: float, counts: Any = 0) -> None:
        super().__init__(params, {"lr": lr})
        self.counts = counts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Do one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("count", self.counts)
                    state["count"] = state["count"] + 1
                    parameter -= group["lr"] / float(state["count"]) * parameter.grad


def warmup_then_milestones(optimizer: Optimizer) -> LRScheduler:
    """A schedule whose state nests the states of two others."""
    parts = [LinearLR(optimizer, total_iters=3), MultiStepLR(optimizer, [2, 6], gamma=0.5)]
    return SequentialLR(optimizer, parts, milestones=[3])


def test_same_numbers_give_the_same_bits(tmp_path: Path) -> None:
    """Oracle: the default AdamW as a callable, and the default schedule as a LambdaLR, for two phases."""

    def rate(step: int) -> float:
        return learning_rate_at(step, peak=3e-4, warmup_steps=100, num_train_steps=12, final_fraction=0.05)

    task = partial(ToyTask, critic=True)
    TrainLoop(task(), PLAIN, tmp_path / "default").train()
    TrainLoop(task(), replace(PLAIN, optimizer=DEFAULT_ADAMW), tmp_path / "optimizer").train()
    adamw = partial(DEFAULT_ADAMW, lr=1.0)
    settings = replace(PLAIN, optimizer=adamw, schedule=partial(LambdaLR, lr_lambda=rate))
    TrainLoop(task(), settings, tmp_path / "both").train()
    assert_same_run(tmp_path / "default", tmp_path / "optimizer")
    assert_same_run(tmp_path / "default", tmp_path / "both")


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (partial(SGD, lr=1e-2, momentum=0.9, nesterov=True), None),
        pytest.param(partial(Adagrad, lr=1e-2), None, marks=pytest.mark.slow),
        (partial(NAdam, lr=1e-2), partial(OneCycleLR, max_lr=1e-2, total_steps=12)),
        pytest.param(partial(PythonState, lr=1e-2), None, marks=pytest.mark.slow),
        pytest.param(None, warmup_then_milestones, marks=pytest.mark.slow),
        ({"critic": SGD}, {"main": partial(MultiStepLR, milestones=[3, 7, 8])}),
        (partial(SGD, lr=np.float32(1e-2), momentum=np.float64(0.9)), partial(MultiStepLR, milestones=[3], gamma=0.1)),
    ],
    ids=["sgd", "adagrad", "nadam-onecycle", "python-numbers", "sequential", "by-phase", "numpy-numbers"],
)
def test_resume_is_exact(optimizer: Any, schedule: Any, tmp_path: Path) -> None:
    """Three pieces equal one run, with a phase that begins later: state of optimizer, groups and schedule."""
    settings = replace(PLAIN, optimizer=optimizer, schedule=schedule)
    task = partial(ToyTask, critic=True, critic_from=4)
    TrainLoop(task(), settings, tmp_path / "straight").train()
    for seed, steps in enumerate((3, 5, None)):
        TrainLoop(task(seed=seed), settings, tmp_path / "resumed").train(stop_after_steps=steps)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_schedule_starts_with_its_phase_and_equals_plain_torch(tmp_path: Path) -> None:
    """Oracle: the rates of the scheduler alone, logged with the step that they belong to."""
    settings = replace(PLAIN, log_every=1, schedule=partial(OneCycleLR, max_lr=0.1, total_steps=12))
    TrainLoop(ToyTask(critic=True, critic_from=4), settings, tmp_path).train()
    optimizer = SGD([nn.Parameter(torch.zeros(1))], momentum=0.9)
    scheduler, rates = OneCycleLR(optimizer, max_lr=0.1, total_steps=12), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for phase, expected in [("main", rates), ("critic", rates[:8])]:
        assert [row["learning_rate"] for row in rows_of(tmp_path) if row["phase"] == phase] == expected


def test_default_schedule_has_the_rates_of_the_optimizer_as_peaks(tmp_path: Path) -> None:
    """Warm-up and cosine scale the rate of each group."""
    task = linear_task()
    optimizer = SGD([{"params": [task.module.weight]}, {"params": [task.module.bias], "lr": 0.5}], lr=0.25)
    TrainLoop(task, replace(PLAIN, warmup_steps=4, optimizer=optimizer), tmp_path).train(stop_after_steps=4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]


def test_objects_are_accepted_and_resume(tmp_path: Path) -> None:
    """An optimizer of the parameters and its scheduler; a second loop continues with new objects, bit for bit."""

    def loop(folder: Path) -> TrainLoop:
        task = linear_task()
        optimizer = Adagrad(task.module.parameters(), lr=0.1)
        schedule = MultiStepLR(optimizer, milestones=[4, 8])
        return TrainLoop(task, replace(PLAIN, optimizer=optimizer, schedule=schedule), folder)

    loop(tmp_path / "straight").train()
    loop(tmp_path / "resumed").train(stop_after_steps=5)
    loop(tmp_path / "resumed").train()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_objects_continue_after_an_interruption(tmp_path: Path) -> None:
    """The same objects are set back to the checkpoint."""

    def fail(count: int) -> None:
        if count == 6:
            raise KeyboardInterrupt

    def loop(name: str, on_batch: Callable[[int], None] | None) -> TrainLoop:
        task = ToyTask(on_batch=on_batch)
        optimizer = NAdam(task.module.parameters(), lr=0.1)
        settings = replace(PLAIN, optimizer=optimizer, schedule=OneCycleLR(optimizer, max_lr=0.1, total_steps=12))
        return TrainLoop(task, replace(settings, checkpoint_every_steps=2), tmp_path / name)

    loop("straight", None).train()
    interrupted = loop("interrupted", fail)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.train()
    assert_same_run(tmp_path / "straight", tmp_path / "interrupted")


@pytest.mark.parametrize("steps", only_quick([4, None], [4]), ids=["unfinished", "finished"])
@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": partial(SGD, lr=0.2)},
        {"optimizer": partial(AdamW, lr=0.1)},
        {"optimizer": None},
        {"schedule": partial(MultiStepLR, milestones=[2])},
    ],
)
def test_another_optimizer_is_not_resumed(change: dict[str, Any], steps: int | None, tmp_path: Path) -> None:
    """Class and settings are part of the run, also when it is finished."""
    settings = replace(PLAIN, optimizer=partial(SGD, lr=0.1))
    TrainLoop(ToyTask(), settings, tmp_path).train(stop_after_steps=steps)
    with pytest.raises(ValueError, match="other settings .*settings.(optimizer|schedule)"):
        TrainLoop(ToyTask(), replace(settings, **change), tmp_path).train()


@pytest.mark.slow
def test_allowed_changes_of_optimizer_and_schedule_take_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The new values hold from the first step on, a schedule advances to it, only another class starts afresh."""
    steps: list[tuple[str, float, bool, float]] = []

    def record(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        group = optimizer.param_groups[0]
        steps.append((type(optimizer).__name__, group["lr"], bool(optimizer.state), group.get("momentum")))

    def train(stop_after: int, **choice: Any) -> None:
        allowed = ("optimizer", "schedule", "learning_rate")
        settings = replace(PLAIN, allow_changed=allowed, **choice)
        handle = register_optimizer_step_pre_hook(record)
        try:
            TrainLoop(ToyTask(), settings, tmp_path).train(stop_after_steps=stop_after)
        finally:
            handle.remove()

    train(2, optimizer=partial(SGD, lr=0.5, momentum=0.9), schedule=partial(StepLR, step_size=1, gamma=0.5))
    train(2, optimizer=partial(SGD, lr=0.25, momentum=0.1), schedule=partial(StepLR, step_size=1, gamma=0.5))
    train(1, optimizer=partial(SGD, lr=0.25, momentum=0.1), schedule=partial(StepLR, step_size=1, gamma=0.1))
    assert "starts without" not in caplog.text
    train(1, optimizer=partial(Adam, lr=0.25), schedule=partial(StepLR, step_size=1, gamma=0.1))
    assert "phase 'main': Adam starts without the state of SGD" in caplog.text
    train(1, schedule=partial(StepLR, step_size=6, gamma=0.5))
    train(1, learning_rate=0.5, schedule=partial(StepLR, step_size=6, gamma=0.5))
    train(1)
    rates = [0.5, 0.25, 0.0625, 0.03125, 2.5e-5, 2.5e-6, 1.5e-4, 0.25, 3e-4 * 0.09]
    assert [step[1] for step in steps] == pytest.approx(rates)
    assert [step[0] for step in steps] == ["SGD"] * 5 + ["Adam"] + ["AdamW"] * 3
    assert [step[2] for step in steps] == [False, True, True, True, True, False, False, True, True]
    assert [step[3] for step in steps[:5]] == [0.9, 0.9, 0.1, 0.1, 0.1]
    with pytest.raises(ValueError, match="^the schedule OneCycleLR of phase 'main' has no learning rate for step 5 "):
        train(1, schedule=partial(OneCycleLR, max_lr=0.1, total_steps=4))
    train(1)  # the checkpoint is as before


def test_default_run_stores_no_choice(tmp_path: Path) -> None:
    """Without a choice, the identity of a run has the same entries as before there were any."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=1)
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())["state"]
    assert state["optimizers"] == {"main": {}}
    assert not {"optimizer", "schedule"} & set(state["run"]["settings"])


def test_what_does_not_fit_raises_an_error(tmp_path: Path) -> None:
    """Other parameters, another optimizer, no optimizer, a schedule of metrics, unknown phases."""
    other = SGD(nn.Linear(2, 2).parameters())

    def check(message: str, kind: type[Exception] = ValueError, **choice: Any) -> None:
        with pytest.raises(kind, match=message):
            TrainLoop(ToyTask(critic=True), replace(PLAIN, **choice), tmp_path).train()

    check("the SGD of phase 'main' must have .*model.inner.weight.* pass a dict", optimizer=other)
    check("schedule changes another optimizer", schedule=LinearLR(other))
    check("must return a torch.optim.Optimizer, got list", TypeError, optimizer=lambda groups: groups)
    check("whose step.. needs no metric, got ReduceLROnPlateau", TypeError, schedule=ReduceLROnPlateau)
    check("has phases .'critic', 'main'., but .*'discriminator'", optimizer={"discriminator": SGD})
    assert not (tmp_path / "finished.json").exists()


def test_settings_that_a_choice_replaces_raise_an_error() -> None:
    """They would be ignored."""
    for name, value in [("learning_rate", 1e-3), ("weight_decay", 0), ("betas", (0.5, 0.9))]:
        with pytest.raises(ValueError, match=f"{name} is .* left out, because optimizer replaces it"):
            LoopSettings(num_train_steps=1, batch_size=1, optimizer=SGD, **{name: value})
    with pytest.raises(ValueError, match="warmup_steps is 5; .* because schedule replaces it"):
        LoopSettings(num_train_steps=1, batch_size=1, warmup_steps=5, schedule=LinearLR)


def test_state_that_a_checkpoint_cannot_hold_raises_an_error(tmp_path: Path) -> None:
    """The error names the state: an object for a parameter, a tensor in a group, a state without a parameter."""

    class Stateful(SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.state["history"] = {"losses": []}

    class Rates:
        """A count that is no number."""

        def __add__(self, other: int) -> "Rates":
            return self

        def __float__(self) -> float:
            return 1.0

    counting = partial(PythonState, lr=0.1, counts=Rates())
    for number, (choice, message) in enumerate(
        [
            (counting, "model.transposed/count of values of the PythonState of phase 'main' of type Rates"),
            (partial(SGD, lr=torch.tensor(0.1)), "lr of groups of the SGD of phase 'main' of type Tensor"),
            (Stateful, "the Stateful of phase 'main', because a part of its state belongs to no parameter"),
        ]
    ):
        with pytest.raises(ValueError, match=f"a checkpoint cannot store .*{message}"):
            TrainLoop(ToyTask(), replace(PLAIN, optimizer=choice), tmp_path / str(number)).train()


def test_weight_decay_of_a_choice_leaves_vectors_out(tmp_path: Path) -> None:
    """The callable receives the groups of the default optimizer."""
    received: list[dict[str, Any]] = []

    def choice(groups: list[dict[str, Any]]) -> Optimizer:
        received.extend({**group, "params": [tuple(tensor.shape) for tensor in group["params"]]} for group in groups)
        return SGD(groups, lr=0.1, weight_decay=0.5)

    TrainLoop(linear_task(), replace(PLAIN, optimizer=choice), tmp_path).train(stop_after_steps=1)
    assert received == [{"params": [(4, 4)]}, {"params": [(4,)], "weight_decay": 0.0}]


def test_sgd_equals_a_plain_loop(tmp_path: Path) -> None:
    """Oracle: momentum and a constant rate, written with torch alone."""
    sgd, constant = partial(SGD, lr=0.1, momentum=0.9), partial(LambdaLR, lr_lambda=lambda step: 1.0)
    settings = LoopSettings(num_train_steps=9, batch_size=8, max_grad_norm=100, optimizer=sgd, schedule=constant)
    task, oracle = linear_task(), linear_task()
    TrainLoop(task, settings, tmp_path).train()
    optimizer = sgd(oracle.module.parameters())
    for _ in range(9):
        optimizer.zero_grad()
        (oracle.module(oracle.data) - 2 * oracle.data).pow(2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(task.module.weight, oracle.module.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(task.module.bias, oracle.module.bias, rtol=0, atol=1e-6)
