"""Training with noise: random tokens in the input of a stage, while targets and validation stay clean."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.lm.task import StageObjective, StageTask
from audiolm_pytorch.lm.training_data import ShardSource
from audiolm_pytorch.saving.files import read_weights
from audiolm_pytorch.tokens.streams import Stream
from tests.audiolm_pytorch.lm.test_trainers import QUICK, TRAINERS, make_shards
from tests.helpers.fakes import SIZES, tiny_stages
from tests.helpers.processes import run_two_processes
from tests.helpers.quick import only_quick

EXTRA = [Stream("words", 5, rate_hz=None, is_input=True), Stream("melody", 7, rate_hz=25, is_input=True)]


def noisy_task(folder: Path, name: str, pattern: str = "delayed", **noise: Any) -> StageTask:
    """The task of a stage with further input streams, on four random records; two of them end inside the crop."""

    def make_record(index):
        draws, frames = torch.Generator().manual_seed(index), 160 + 20 * index
        fields = {
            "semantic": (12, frames // 2),
            "acoustic": (16, frames, 4),
            "words": (5, index),
            "melody": (7, frames // 2),
        }
        return {key: torch.randint(size, shape, generator=draws).numpy() for key, (size, *shape) in fields.items()}

    write_shards(folder, make_record, 4, {})
    stage = tiny_stages()[name]
    stage = type(stage)(**{**stage.config, **SIZES, "pattern": pattern, "extra_streams": EXTRA})
    source = ShardSource(TokenShards(folder), stage, seconds=3.6, audio_conditioner=None)
    return StageTask(stage, source, source, objective=StageObjective(**noise))


def read_and_predicted(task: StageTask, is_training: bool = True):
    """Ids that the model reads, ids and mask of its targets, and the packed tokens of the same crops."""
    stage, calls = task.transformer.train(is_training), []
    hidden, loss = stage.hidden, stage._loss
    stage.hidden = lambda ids, mask, conditions: (calls.append(ids), hidden(ids, mask, conditions))[1]
    stage._loss = lambda states, targets, mask: (calls.extend([targets, mask]), loss(states, targets, mask))[1]
    batch = task.batch([(epoch, index) for epoch in range(6) for index in range(4)])
    task.loss(batch, 0)
    inputs = task.train.read(batch)
    del stage.hidden, stage._loss
    return *calls, stage.packed(inputs.tokens, inputs.ends)


@pytest.mark.parametrize("pattern", only_quick(["flat", "delayed", "parallel"], ["delayed"]))
@pytest.mark.parametrize("name", TRAINERS)
def test_noise_replaces_only_tokens_of_its_streams(name, pattern, tmp_path):
    """Noise stays in its level; padding, ends, other streams, targets and validation are clean."""
    inputs = {"semantic": (), "coarse": ("semantic",), "fine": ("coarse",)}[name]
    task = noisy_task(tmp_path, name, pattern, history_noise=1.0, input_noise=0.5 if inputs else 0.0)
    stage = task.transformer
    stage.cond_drop_prob = 0.0
    level_of_id, streams = torch.full((stage.layout.num_ids,), -1), stage.layout.streams
    for number, block in enumerate(stage.layout._blocks):
        if block.is_token:
            level_of_id[block.first_id : block.first_id + streams[block.stream].vocab_size] = number
    read, targets, mask, packed = read_and_predicted(task)
    assert torch.equal(targets, packed.ids[:, 1:]) and torch.equal(mask, packed.loss_mask[:, 1:])
    clean, is_input = packed.ids[:, :-1], packed.input_mask[:, :-1]
    assert torch.equal(level_of_id[read][is_input], level_of_id[clean][is_input])  # noise has the level of its token
    may_differ = torch.zeros_like(is_input)
    for number, block in enumerate(stage.layout._blocks):
        stream = streams[block.stream]
        if not block.is_token or stream.name not in (name, *inputs):
            continue
        is_level = is_input & (level_of_id[clean] == number)
        may_differ |= is_level
        shares = ((read != clean) & is_level).sum((1, 2)) / is_level.sum((1, 2))
        limit = (0.5 if stream.is_input else 1.0) * (1 - 1 / stream.vocab_size)  # equal tokens are drawn by chance
        assert shares.max() < limit + 0.15 and shares.max() - shares.min() > 0.5 * limit  # one share per item
        assert shares.mean() == pytest.approx(limit / 2, abs=0.15)
        ids = read[is_level & (read != clean)] - block.first_id
        assert ids.unique().numel() == stream.vocab_size  # every token of the vocabulary is drawn
    assert torch.equal(read[~may_differ], clean[~may_differ])
    read, targets, mask, packed = read_and_predicted(task, is_training=False)
    assert torch.equal(read, packed.ids[:, :-1]) and torch.equal(targets, packed.ids[:, 1:])


def test_tokens_that_are_repeated_in_rows_have_equal_noise(tmp_path):
    """A semantic token that spans two rows of the coarse stage is replaced in both rows by the same token."""
    task = noisy_task(tmp_path, "coarse", history_noise=1.0, input_noise=1.0)
    read, *_, packed = read_and_predicted(task)
    num_frames = int(task.train.batch([(0, 0)]).lengths["semantic"][0])
    semantic, clean = (ids[0, 1 : 1 + 2 * num_frames, 0] for ids in (read, packed.ids))  # after the null token
    assert torch.equal(semantic[0::2], semantic[1::2]) and torch.equal(clean[0::2], clean[1::2])
    assert not torch.equal(semantic, clean)


def train(folder: Path, *stops: int | None, **noise: float) -> dict[str, torch.Tensor]:
    """Train the coarse stage, with a pause after each number of steps, and return its weights."""
    for stop in stops:
        torch.manual_seed(5)
        trainer = TRAINERS["coarse"](
            transformer=tiny_stages()["coarse"],
            shards=make_shards(folder.parent / "shards"),
            results_folder=folder,
            objective=StageObjective(**noise),
            **QUICK,
        )
        trainer.train(stop_after_steps=stop)
    return trainer.task.module.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_has_the_same_noise(tmp_path):
    """Noise depends on seed, step and process only; without noise, weights are those of the default."""
    noise = {"history_noise": 0.6, "input_noise": 0.3}
    unbroken = train(tmp_path / "unbroken", None, **noise)
    assert equal(train(tmp_path / "resumed", 1, 2, None, **noise), unbroken)
    clean = train(tmp_path / "clean", None)
    assert equal(train(tmp_path / "zero", None, history_noise=0.0), clean) and not equal(clean, unbroken)


@pytest.mark.slow
def test_two_processes_resume_with_the_same_noise(tmp_path):
    """Each of two processes draws its own noise again when the run is resumed."""
    weights = []
    for stops in ("0", "2 0"):
        folder = tmp_path / stops.replace(" ", "_")
        done = run_two_processes(__file__, folder, *stops.split())
        assert (folder / "coarse" / "config.json").exists(), done.stderr[-3000:]
        weights.append(read_weights(folder / "coarse" / "model.safetensors")[0])
    assert equal(*weights)


def test_level_weights_change_only_the_training_loss(tmp_path):
    """The loss is the weighted mean of the levels; equal weights are the default; metrics have no weights."""
    losses = {}
    for weights in ((), (1, 1), (3, 1)):
        task = noisy_task(tmp_path, "coarse", level_weights=weights)
        torch.manual_seed(1)
        task.transformer.load_state_dict({k: torch.randn_like(v) for k, v in task.transformer.state_dict().items()})
        losses[weights] = task.loss(task.batch([(0, 1), (0, 2)]), 0)
    levels = [losses[3, 1].metrics[f"loss_coarse.{level}"] for level in (0, 1)]
    torch.testing.assert_close(losses[3, 1].loss.detach(), 0.75 * levels[0] + 0.25 * levels[1])
    torch.testing.assert_close(losses[1, 1].loss, losses[()].loss)
    assert losses[3, 1].metrics["loss_coarse"] == losses[()].metrics["loss_coarse"]
    for wrong, message in (((1,), "level_weights needs 2 numbers, got"), ((1, 0), "level_weights must be positive")):
        with pytest.raises(ValueError, match=message):
            noisy_task(tmp_path, "coarse", level_weights=wrong)


def test_wrong_noise_raises_errors(tmp_path):
    """Shares outside [0, 1], and noise for inputs that no stage predicts."""
    for name in ("level_drop_prob", "history_noise", "input_noise"):
        with pytest.raises(ValueError, match=rf"{name} must be in 0..1, got 1.5"):
            StageObjective(**{name: 1.5})
    with pytest.raises(ValueError, match="no earlier stage predicts the inputs of the semantic transformer"):
        noisy_task(tmp_path / "two", "semantic", input_noise=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), *[int(stop) or None for stop in sys.argv[2:]], history_noise=0.6, input_noise=0.3)
