"""The folder of a run: whose files it may hold, one training at a time, other settings on request, signals."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audiolm_pytorch.saving.files import write_json
from audiolm_pytorch.training import TrainLoop
from audiolm_pytorch.training.run_folder import claimed_folder, read_record
from audiolm_pytorch.training.stopping import stop_signals
from tests.helpers.quick import only_quick
from tests.helpers.toy_training import SETTINGS, ToyTask, assert_same_run, rows_of, tensors_in


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactness is promised on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def terminal() -> Iterator[None]:
    """The signal handlers of a process in a terminal; background processes start with SIGINT or SIGHUP ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["codec/config.json", "model.safetensors", "metrics.jsonl", "samples/1.wav", "a.wav"])
def test_files_of_the_user_are_not_touched(tmp_path: Path, name: str) -> None:
    """A folder that has files, but no run, is refused, and nothing in it changes."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match=f"do not belong to a run .*{name.split('/')[0]}.*new or empty folder"):
        TrainLoop(ToyTask(), SETTINGS, tmp_path).train()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and file.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["checkpoint/state.json", "checkpoint.new/a.txt", "finished.json", "kmeans.json", ".photo.partial.wav"]
)
def test_a_file_of_the_user_with_a_name_of_ours_is_not_overwritten(tmp_path: Path, name: str) -> None:
    """The name alone does not make a folder that of a run, and the error names the file."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"mine": 1}')
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    (tmp_path / "toy").mkdir()
    message = f"{name} is damaged or does not belong to a run|do not belong to a run .*{name}"
    with pytest.raises(ValueError, match=f"({message}).*new or empty folder"):
        TrainLoop(ToyTask(), SETTINGS, tmp_path).train()
    assert file.read_text() == '{"mine": 1}'


def test_an_empty_folder_and_leftovers_of_a_kill_are_accepted(tmp_path: Path) -> None:
    """Leftovers are removed at the next start, also deep in the folder, and in a finished run."""
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / ".lock").touch()
    loop = TrainLoop(ToyTask(), SETTINGS, tmp_path)
    for _ in range(2):
        loop.train()
        assert not list(tmp_path.rglob(".writing-*")) and not list(tmp_path.rglob("*.partial"))
        (tmp_path / "codec" / ".writing-1").mkdir(parents=True)
        (tmp_path / "codec" / ".chunk-00001.77.partial").mkdir()
        (tmp_path / "codec" / ".1_step_0000001.77.partial.wav").touch()
    loop.train()
    assert list((tmp_path / "codec").iterdir()) == []


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": "3"}', '{"step": null}', '{"step": [1], "run": {}}', "3"])
def test_records_with_other_entries_are_named(tmp_path: Path, content: str) -> None:
    """A JSON file that was changed by hand is a ValueError that names the file, never a KeyError or TypeError."""
    file = tmp_path / "finished.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="finished.json (has no usable entries .*'step'|must contain a JSON object)"):
        read_record(file, step=int, run=dict)


def test_an_altered_record_of_a_finished_run_is_named(tmp_path: Path) -> None:
    """Entries of another type raise the error before anything is written."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train()
    record = read_record(tmp_path / "finished.json")
    for change in ({"step": "12"}, {"metrics": []}, {"run": None}):
        write_json(tmp_path / "finished.json", {**record, **change})
        with pytest.raises(ValueError, match=f"finished.json has no usable entries .'{next(iter(change))}'"):
            TrainLoop(ToyTask(), SETTINGS, tmp_path).train()


def test_leftovers_in_the_folder_of_another_run_stay(tmp_path: Path) -> None:
    """Another training may be writing there."""
    (tmp_path / "other" / ".writing-1").mkdir(parents=True)
    (tmp_path / "other" / ".lock").touch()
    with claimed_folder(tmp_path, {"other": ()}):
        assert (tmp_path / "other" / ".writing-1").exists()


def test_the_target_of_a_link_is_created(tmp_path: Path) -> None:
    """A link to a folder of another disk that does not exist yet."""
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "run").train(stop_after_steps=1)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "run" / "checkpoint").is_dir()


def test_two_trainers_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second one is refused, in a thread of the same process too, and the first is not disturbed."""
    started, may_end = threading.Event(), threading.Event()
    second = TrainLoop(ToyTask(), SETTINGS, tmp_path / "run")
    task = ToyTask(on_batch=lambda count: (started.set(), may_end.wait(20)) if count == 2 else None)
    thread = threading.Thread(target=TrainLoop(task, SETTINGS, tmp_path / "run").train)
    thread.start()
    assert started.wait(20)
    try:
        with pytest.raises(ValueError, match="is in use by another training"):
            second.train()
    finally:
        may_end.set()
        thread.join()
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_trainer_continues_from_the_checkpoint_of_another_one(tmp_path: Path) -> None:
    """The state in memory is not used if another trainer has advanced the run in the meantime."""
    first, second = (TrainLoop(ToyTask(), SETTINGS, tmp_path / "run") for _ in range(2))
    assert [loop.train(stop_after_steps=3).step for loop in (first, second, first, second)] == [3, 6, 9, 12]
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"batch_size": 4}, ("batch_size",)),
        ({"learning_rate": 0.1, "seed": 3}, ("settings.learning_rate", "settings.seed")),
        ({"num_train_steps": 14, "weight_decay": 0.1}, ("settings",)),
        ({"ema_decay": None}, ("ema_decay",)),
    ],
    ids=["name", "paths", "all", "without EMA"],
)
@pytest.mark.parametrize("steps", only_quick([5, 12], [5]), ids=["interrupted", "finished"])
def test_other_settings_continue_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], allowed: tuple[str, ...], steps: int
) -> None:
    """The default error names the switch; with it, the change is logged and stored, and steps that are left follow."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=steps)
    with pytest.raises(ValueError, match=f"allow_changed=.*settings.{next(iter(change))}.*--allow-changed settings"):
        TrainLoop(ToyTask(), replace(SETTINGS, **change), tmp_path).train()
    settings = replace(SETTINGS, **change, allow_changed=allowed)
    loop = TrainLoop(ToyTask(), settings, tmp_path)
    with caplog.at_level(logging.WARNING):
        result = loop.train()
    assert result.step == settings.num_train_steps and loop.is_finished
    assert all(f"settings.{name}: found" in caplog.text for name in change) and f"(step {steps})" in caplog.text
    again = TrainLoop(ToyTask(), replace(settings, allow_changed=()), tmp_path)
    assert again.train() == result


def test_other_settings_of_a_finished_run_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The record of the end and the checkpoint both differ from the new settings."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train()
    steps = SETTINGS.num_train_steps + 1
    TrainLoop(ToyTask(), replace(SETTINGS, num_train_steps=steps, allow_changed=("num_train_steps",)), tmp_path).train()
    assert len([text for text in caplog.messages if "continues" in text]) == 1


def test_names_that_no_setting_has_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With similar names; names of settings that did not change are no mistake."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=1)
    allowed = ("batchsize", "batch_size", "settings")
    TrainLoop(ToyTask(), replace(SETTINGS, allow_changed=allowed), tmp_path).train(stop_after_steps=1)
    (message,) = [text for text in caplog.messages if text.startswith("allow_changed: ")]
    assert message.endswith("has no setting 'batchsize'; use batch_size")


def test_an_average_can_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """A run without EMA continues with an EMA, which begins with the weights of that step."""
    TrainLoop(ToyTask(), replace(SETTINGS, ema_decay=None), tmp_path).train(stop_after_steps=5)
    loop = TrainLoop(ToyTask(), replace(SETTINGS, allow_changed=("ema_decay",)), tmp_path)
    assert loop.train().step == 12
    assert read_record(tmp_path / "checkpoint" / "state.json", files=dict)["files"].keys() >= {"ema.safetensors"}


def test_only_the_named_settings_may_change(tmp_path: Path) -> None:
    """Another difference beside the allowed one is an error, as are fewer steps than were done and other phases."""
    TrainLoop(ToyTask(), SETTINGS, tmp_path).train(stop_after_steps=5)
    files = tensors_in(tmp_path)
    for change, allowed, task in [
        ({"batch_size": 4, "seed": 1}, ("batch_size",), ToyTask()),
        ({"num_train_steps": 4}, ("num_train_steps",), ToyTask()),
        ({}, ("phases",), ToyTask(critic=True)),
    ]:
        with pytest.raises(ValueError, match="other settings .*seed|run of 5 steps that cannot be continued"):
            TrainLoop(task, replace(SETTINGS, **change, allow_changed=allowed), tmp_path).train()
    assert tensors_in(tmp_path) == files


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
    ids=["Ctrl-C", "SIGTERM", "closed terminal"],
)
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    terminal: None,
    number: signal.Signals,
    expected: type[BaseException],
) -> None:
    """No step is lost: the step ends, its number is named, and the resumed run equals the straight one."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(one) for one in signals]
    repeats = 2 if number == signal.SIGHUP else 1  # a closed terminal sends it from the shell and from the kernel
    task = ToyTask(on_batch=lambda count: [os.kill(os.getpid(), number) for _ in range(repeats * (count == 7))])
    with pytest.raises(expected) as raised, caplog.at_level(logging.WARNING):
        TrainLoop(task, SETTINGS, tmp_path / "run").train()
    message = str(raised.value) if number == signal.SIGINT else caplog.text
    assert f"stopped by {number.name} after step 7 of 12 of the toy" in message
    assert number == signal.SIGINT or raised.value.args == (128 + number,)
    assert [signal.getsignal(one) for one in signals] == handlers
    assert task.batches_made == 7
    loop = TrainLoop(ToyTask(seed=4), SETTINGS, tmp_path / "run")
    assert loop.train(stop_after_steps=1).step == 8
    loop.train()
    TrainLoop(ToyTask(), SETTINGS, tmp_path / "straight").train()
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "run")


def test_a_second_signal_ends_at_once(terminal: None) -> None:
    """A hanging step can be interrupted."""
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"), stop_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored_and_threads_train(tmp_path: Path) -> None:
    """Under nohup-like settings nothing changes; in a thread, where no handler can be set, training works."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not request.number
    finally:
        signal.signal(signal.SIGTERM, before)
    results: list[Any] = []
    loop = TrainLoop(ToyTask(), SETTINGS, tmp_path)
    thread = threading.Thread(target=lambda: results.append(loop.train().step))
    thread.start()
    thread.join()
    assert results == [12]
