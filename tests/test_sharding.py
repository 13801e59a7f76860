"""Two processes (gloo) under DDP and under FSDP2 (`fully_shard`) equal one process with the joined batch."""

import os
import sys
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.semantic.best_rq import model as best_rq_model
from audiolm_pytorch.training.checkpoint import CheckpointFolder
from tests.helpers.processes import run_two_processes
from tests.helpers.quiet_trainers import RANDOM_MASK, SHARDED, every_other_token, quiet_trainers, write_data
from tests.helpers.toy_training import rows_of

# Trainers whose runs are interrupted: one of language models, and one with scalars and chunks.
RESUMED = ("semantic", "mulan")
CONTINUED = ("num_processes", "batch_size")


def train_all(folder: Path) -> None:
    """Train in two processes in all ways."""
    data = folder / "data"
    for name, make in quiet_trainers(data, batch_size=2).items():
        make(folder / "ddp" / name).train()
    sharded = quiet_trainers(data, batch_size=2, fsdp=True)
    for name in SHARDED:
        sharded[name](folder / "fsdp" / name).train()
    parts = quiet_trainers(data, batch_size=2, fsdp=True, sharded_checkpoints=True)
    continued = quiet_trainers(data, batch_size=2, fsdp=True, allow_changed=CONTINUED)
    for name in RESUMED:
        trainer = parts[name](folder / "parts" / name)
        trainer.train(stop_after_steps=1)
        trainer.train(stop_after_steps=1)
        parts[name](folder / "parts" / name).train()
        continued[name](folder / "from_one" / name).train()
        parts[name](folder / "to_one_from_shards" / name).train(stop_after_steps=2)
        sharded[name](folder / "to_one" / name).train(stop_after_steps=2)


@pytest.mark.slow
def test_two_processes_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, EMA and optimizer, with clipping, unused parameters, validation, resume and every kind of checkpoint."""
    monkeypatch.setattr(RANDOM_MASK, every_other_token)
    data = write_data(tmp_path / "data")
    one = quiet_trainers(data, batch_size=4)
    for name in one:
        one[name](tmp_path / "one" / name).train()
    for name in RESUMED:
        one[name](tmp_path / "from_one" / name).train(stop_after_steps=2)
    done = run_two_processes(__file__, tmp_path)
    assert (tmp_path / "done").exists(), done.stderr[-5000:]
    for name in RESUMED:
        for folder in ("to_one", "to_one_from_shards"):
            quiet_trainers(data, batch_size=4, allow_changed=CONTINUED)[name](tmp_path / folder / name).train()
        shards = CheckpointFolder(tmp_path / "parts" / name)
        assert len(list(shards.path.glob("*-of-00002.safetensors"))) == 6
        straight, parts = (CheckpointFolder(tmp_path / kind / name).read() for kind in ("fsdp", "parts"))
        for kind, tensors in straight.tensors.items():
            assert all(torch.equal(value, parts.tensors[kind][key]) for key, value in tensors.items())
        rows = [rows_of(tmp_path / way / name) for way in ("fsdp", "one")]
        for row, expected in zip(*rows, strict=True):
            assert row.pop("phase") == expected.pop("phase")
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    compared = {
        "ddp": tuple(one),
        "fsdp": SHARDED,
        **dict.fromkeys(("to_one", "to_one_from_shards", "from_one"), RESUMED),
    }
    for folder, names in compared.items():
        for name in names:
            expected, found = (CheckpointFolder(tmp_path / way / name).read().tensors for way in ("one", folder))
            assert expected.keys() == found.keys()
            for kind, tensors in expected.items():
                assert tensors.keys() == found[kind].keys()
                for key, value in tensors.items():
                    if key == "code_usage.counts":  # of the first process
                        continue
                    message = f"{folder} {name} {kind} {key}"
                    torch.testing.assert_close(found[kind][key], value, rtol=0, atol=1e-5, msg=message)


if __name__ == "__main__":
    torch.set_num_threads(1)
    best_rq_model.sample_span_mask = every_other_token
    train_all(Path(sys.argv[1]))
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "done").touch()
