"""What a run reports while it trains: rows for trackers, samples for TensorBoard, and lines in a log."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from audiolm_pytorch.training import TrainLoop, tracking
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.samples import Sample
from audiolm_pytorch.training.tracking import ProgressLog
from tests.helpers.toy_training import SETTINGS, ToyTask, rows_of


class FakeTracker(GeneralTracker):
    """A tracker that keeps its calls in a list; it has no method for audio."""

    name, requires_logging_directory = "fake", False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other tests of the loop."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_trackers_receive_settings_and_every_row(tmp_path: Path) -> None:
    """The loop starts and ends the trackers of an Accelerator, which receive the numbers of metrics.jsonl."""
    tracker = FakeTracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    TrainLoop(ToyTask(), SETTINGS, tmp_path, accelerator).train()
    settings, *logged, end = tracker.calls
    assert settings["learning_rate"] == SETTINGS.learning_rate
    assert end == "finish" and accelerator.trackers == []
    losses = [(step, name, value) for step, values in logged for name, value in values.items() if "/loss" in name]
    assert losses == [(row["step"], f"{row['phase']}/loss", row["loss"]) for row in rows_of(tmp_path)]
    assert {name for _, name, _ in losses} == {"main/loss", "valid/loss"}


def test_wrong_trackers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown tracker lists the known ones; one whose package is missing is named with the command to install it."""
    with pytest.raises(ValueError, match="no tracker 'tensorbored'; choose one of: .*tensorboard, "):
        create_accelerator(["tensorbored"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ImportError, match="tracker wandb is not installed; install it with: pip install wandb"):
        create_accelerator(["wandb"])


@pytest.mark.slow
def test_tensorboard_has_numbers_and_audio(tmp_path: Path) -> None:
    """Event files with the loss of every row, and the samples of a step as audio."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class WithSamples(ToyTask):
        def samples(self, step: int) -> list[Sample]:
            return [Sample("1", torch.randn(1, 4000), 8000, codes=torch.randint(8, (10, 2)))]

    accelerator = create_accelerator(["tensorboard"], tmp_path / "trackers")
    TrainLoop(WithSamples(), SETTINGS, tmp_path / "run", accelerator).train()
    found = events.EventAccumulator(str(tmp_path / "trackers" / f"{tmp_path.name}-run")).Reload()
    steps = [row["step"] for row in rows_of(tmp_path / "run") if row["phase"] == "main"]
    assert [event.step for event in found.Scalars("main/loss")] == steps
    audio = found.Audio("samples/1")[-1]
    assert audio.sample_rate == 8000 and audio.step == SETTINGS.num_train_steps
    assert found.Images("spectrograms/1")[-1].width > 10
    assert {"codes/1/level_1", "codes/1/level_2"} == set(found.Tags()["histograms"])


def test_progress_is_logged_without_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A line every few minutes on the first process, and none on a terminal, which has a progress bar."""
    caplog.set_level("INFO", "audiolm_pytorch.training.tracking")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)  # pytest -s has a terminal
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(ProgressLog, "_logged", math.inf)
    log = ProgressLog("codec", 10, 40, shown=True)
    for step in range(11, 15):
        log.update(step, {"train.loss": 1.5, "valid.mel": 2.0})
    assert caplog.messages == [
        "codec: step 12 of 40, train.loss 1.5, 100 s per step, 47 min left",
        "codec: step 14 of 40, train.loss 1.5, 100 s per step, 43 min left",
    ]
    for shown, is_terminal in ((False, False), (True, True)):
        monkeypatch.setattr("sys.stderr.isatty", lambda value=is_terminal: value, raising=False)
        log = ProgressLog("codec", 0, 40, shown=shown)
        for step in range(1, 9):
            log.update(step, {})
    assert len(caplog.messages) == 2
