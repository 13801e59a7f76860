"""Runs of all trainers that are killed at random instants, and files that are damaged."""

import os
from pathlib import Path

import pytest

from tests.helpers.killed_runs import damage_runs, flip_bits, kill_runs, run_for_flips

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the changes of `prepared` after a test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in (
        "audiolm_pytorch.audio.waves.MIN_HZ",
        "audiolm_pytorch.semantic.kmeans_trainer._SECONDS_BETWEEN_STATES",
    ):
        monkeypatch.setattr(name, 800)


def test_killed_runs_equal_straight_ones() -> None:
    """SIGKILL at random instants: after a resume, all files of all trainers are equal, bit for bit."""
    assert kill_runs(7, seed=1) == (7, 0)


def test_damaged_checkpoints_are_replaced_by_the_ones_before() -> None:
    """A cut, zeroed, changed or removed checkpoint: one line, and the next step equals that of the straight run."""
    assert damage_runs(6, seed=1) == 0


def test_no_changed_bit_is_silent(tmp_path: Path) -> None:
    """A changed bit in any file of a run or of a model folder is an error."""
    silent = flip_bits(run_for_flips(tmp_path), 5, seed=1)
    assert len(silent) > 15 and not any(silent.values())
