"""An error of one of two processes (gloo) ends both, with its message."""

import sys
import time
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.training import LoopSettings, TrainLoop
from audiolm_pytorch.training.distributed import create_accelerator
from tests.helpers.processes import run_two_processes
from tests.helpers.toy_training import linear_task


def train(folder: Path, kind: str) -> None:
    """Train until the second process fails, or waits for longer than the timeout."""
    accelerator = create_accelerator(timeout_seconds=10 if kind == "hang" else 300)
    is_second = accelerator.process_index == 1
    task = linear_task()
    load = task.batch

    def broken(indices: list[tuple[int, int]]) -> torch.Tensor:
        task.batches += 1
        if is_second and task.batches == 3 and kind == "error":
            raise OSError("7.wav is broken")
        if is_second and task.batches == 3:
            time.sleep(20)
        return load(indices)

    task.batches, task.batch = 0, broken
    try:
        TrainLoop(task, LoopSettings(num_train_steps=6, batch_size=2), folder / "run", accelerator).train()
    except Exception as error:
        (folder / str(accelerator.process_index)).write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    """The other process raises an error with the message of the first one, long before the timeout."""
    done = run_two_processes(__file__, tmp_path, "error")
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert texts == ["RuntimeError: process 1 failed: OSError: 7.wav is broken", "OSError: 7.wav is broken"], (
        done.stderr
    )


@pytest.mark.slow
def test_a_process_that_hangs_ends_all(tmp_path: Path) -> None:
    """After the timeout, the process that waits raises an error."""
    done = run_two_processes(__file__, tmp_path, "hang")
    assert "Error: " in (tmp_path / "0").read_text(), done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), sys.argv[2])
