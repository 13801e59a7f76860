"""Training of a stage with both kinds of conditions by two processes on the CPU (gloo)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.data.captions import encode_texts
from audiolm_pytorch.lm.trainers import SemanticTransformerTrainer
from audiolm_pytorch.saving.files import read_weights
from tests.helpers.fakes import CONDITION, FakeConditioner, FakeTextConditioner, tiny_stages
from tests.helpers.processes import run_two_processes

# In the last two steps one process has only items without captions and does not use parts of the stage.
CAPTIONS = [["aa"], [], [], ["b", "cccc"]]
RUN = {"num_train_steps": 4, "warmup_steps": 0, "validate_every": 2, "ema_decay": 0.9}


def make_record(index: int) -> dict[str, np.ndarray]:
    """A record of tokens, conditions and captions."""
    return {
        "semantic": (np.arange(20) * (index + 1)) % 12,
        "latents": np.full((1, 1), 0.1 * (index + 1), dtype=np.float32),
        "captions": encode_texts(CAPTIONS[index]),
    }


def train(folder: Path, batch_size: int) -> None:
    """Train without randomness, so that one process can compute the same."""
    torch.manual_seed(0)
    stage = tiny_stages(**CONDITION, text_dim=6, cond_drop_prob=0.0)["semantic"]
    SemanticTransformerTrainer(
        transformer=stage,
        audio_conditioner=FakeConditioner(),
        text_conditioner=FakeTextConditioner(),
        shards=TokenShards(folder.parent / "shards"),
        results_folder=folder,
        batch_size=batch_size,
        **RUN,
    ).train()


@pytest.mark.slow
def test_two_processes_equal_one_process_with_twice_the_batch(tmp_path: Path) -> None:
    """Weights are equal on both processes, also if only one has captions, and equal those of one process."""
    write_shards(tmp_path / "shards", make_record, 4, {})
    done = run_two_processes(__file__, tmp_path / "two")
    assert (tmp_path / "two" / "semantic" / "config.json").exists(), done.stderr[-3000:]
    train(tmp_path / "one", batch_size=4)
    for file in ("semantic/model.safetensors", "conditioning_table.safetensors"):
        one, two = (read_weights(tmp_path / name / file)[0] for name in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), batch_size=2)
