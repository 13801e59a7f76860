"""Runs of all trainers that are killed at random instants, and files that are damaged.

`python -m tests.helpers.killed_runs` runs larger numbers.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from audiolm_pytorch.saving.files import read_json
from tests.helpers import micro
from tests.helpers.killed_runs import damage_runs, flip_bits, kill_runs, run_for_flips
from tests.helpers.micro import write_clips
from tests.helpers.processes import with_default_sigint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


TRAINERS = ("codec", "best_rq", "mulan", "kmeans", "semantic", "coarse", "fine")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the changes of `prepared` after a test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in (
        "audiolm_pytorch.audio.waves.MIN_HZ",
        "audiolm_pytorch.semantic.kmeans_trainer._SECONDS_BETWEEN_STATES",
    ):
        monkeypatch.setattr(name, 800)


@pytest.mark.parametrize("name", TRAINERS)
def test_killed_runs_equal_straight_ones(name: str) -> None:
    """SIGKILL at random instants: after a resume, all files of a trainer are equal, bit for bit."""
    assert kill_runs(1, 1, [name]) == (1, 0)


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "kmeans"])
def test_damaged_checkpoints_are_replaced_by_the_ones_before(name: str) -> None:
    """A cut, zeroed, changed or removed checkpoint: one line, and the next step equals that of the straight run."""
    assert damage_runs(1, 1, [name]) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_the_command_ends_with_a_checkpoint(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """The exit status tells the signal, one line names the step, and the checkpoint is of that step."""
    words = ["train", "codec", "--preset", "micro", "--data", str(write_clips(tmp_path / "data", 5))]
    words += ["--out", str(tmp_path / "run"), "--scale", "50"]
    command = [sys.executable, str(Path(micro.__file__)), *words]
    process = subprocess.Popen(with_default_sigint(command), stderr=subprocess.PIPE, text=True)
    state = tmp_path / "run" / "codec" / "checkpoint" / "state.json"
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and not (state.is_file() and '"step": 0,' not in state.read_text()[:200]):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == status, errors
    [line] = errors.splitlines()
    step = re.search(
        rf"stopped by {number.name} after step (\d+) of 600 of the codec; a checkpoint is in .*checkpoint", line
    )
    assert step and read_json(state)["step"] == int(step[1])


def test_no_changed_bit_is_silent(tmp_path: Path) -> None:
    """A changed bit in any kind of file of a run or of a model folder is an error."""
    silent = flip_bits(run_for_flips(tmp_path), 5, seed=1)
    assert len(silent) > 25 and not any(silent.values())
