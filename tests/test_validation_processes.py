"""Validation by two processes (gloo): each reads a share of the items, and both return what one process returns."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audiolm_pytorch.audio import waves
from audiolm_pytorch.codecs.training import SoundStreamTrainer
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import load_split
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.training.distributed import create_accelerator
from musiclm_pytorch.melody.trainer import MelodyTask
from tests.helpers.killed_runs import make_trainers
from tests.helpers.micro import write_clips
from tests.helpers.processes import run_two_processes
from tests.helpers.small_models import small_soundstream
from tests.helpers.toy_musiclm import toy_embedder


def write_split(folder: Path) -> None:
    """Write four clips for training and seven for validation, with captions and notes."""
    write_clips(folder, num_clips=11)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "pitch_class": [[0.0, 0.5, "A"], [0.5, 1.0, "E"]]}) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines[:4]))
    (folder / "valid.jsonl").write_text("".join(lines[4:]))


def make_tasks(data: Path) -> dict[str, Any]:
    """Tasks of untrained models, with batches of two items."""
    trainers, items = make_trainers(data), load_split(data)
    tasks = {name: trainers[name](data.parent / name).task for name in ("best_rq", "mulan", "semantic", "fine")}
    tasks["best_rq"]._valid_batch_size = tasks["mulan"].held_out.max_batch = 2
    tasks["codec"] = SoundStreamTrainer(
        small_soundstream(target_sample_hz=8000, denoising=FiLM(dim=16)),
        items=items,
        noise_items=items,
        batch_size=2,
        num_train_steps=10,
    ).task
    tasks["melody"] = MelodyTask(toy_embedder(), *items, seed=0)
    return tasks


def validate(tasks: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of each task, and the number of crops that this process read."""
    results, get = {}, CropDataset.get
    for name, task in tasks.items():
        read = []
        CropDataset.get = lambda crops, *pair, read=read: (read.append(pair), get(crops, *pair))[1]  # type: ignore
        task.module.eval()
        with torch.no_grad():
            results[name] = {"metrics": task.validate(), "read": len(read)}
    CropDataset.get = get  # type: ignore[method-assign]
    return results


@pytest.mark.slow
def test_two_processes_share_the_validation(tmp_path: Path) -> None:
    """Guards equal metrics on any number of processes, and that no process validates everything."""
    write_split(tmp_path / "data")
    done = run_two_processes(__file__, tmp_path / "data")
    files = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    (alone, first), (_, second) = (json.loads(file.read_text()) for file in files)
    for name, expected in alone.items():
        assert first[name]["metrics"] == second[name]["metrics"]
        assert first[name]["metrics"] == pytest.approx(expected["metrics"], abs=1e-6, rel=1e-6), name
        reads = [first[name]["read"], second[name]["read"]]
        assert sum(reads) == expected["read"] and (name == "melody" or 0 < min(reads)), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    waves.MIN_HZ = 1  # the stages of the tests are at 800 Hz
    folder = Path(sys.argv[1])
    tasks = make_tasks(folder)
    alone = validate(tasks)
    create_accelerator()
    found = json.dumps([alone, validate(tasks)])
    (folder.parent / f"{os.environ['RANK']}.json").write_text(found)
