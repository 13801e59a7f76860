"""Checkpoints: an interruption at any instant leaves one whole generation."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiolm_pytorch.saving.files import differences
from audiolm_pytorch.training.checkpoint import Checkpoint, CheckpointFolder


def generation(step: int) -> Checkpoint:
    """A checkpoint with its step in every part."""
    tensors = {"model": {"weight": torch.full((3,), float(step))}, "optimizer": {"weight/step": torch.tensor(step)}}
    return Checkpoint(step, tensors, {"progress": {"step": step}})


def assert_whole(checkpoint: Checkpoint, step: int) -> None:
    """Check that all parts belong to the same step."""
    assert checkpoint.step == step
    assert checkpoint.state == {"progress": {"step": step}}
    assert torch.equal(checkpoint.tensors["model"]["weight"], torch.full((3,), float(step)))
    assert checkpoint.tensors["optimizer"]["weight/step"] == step


def in_child(action: Callable[[], None]) -> int:
    """Run in a forked process that ends without clean-up, as a killed one does; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(call: int) -> None:
    """Kill the process right before the n-th call that changes the disk."""
    seen = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os._exit(9)
            return original(*args, **kwargs)

        return wrapper

    for module, name in [
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (shutil, "rmtree"),
        (os, "mkdir"),
    ]:
        setattr(module, name, dying(getattr(module, name)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_death_between_any_two_changes_of_the_disk_leaves_a_whole_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every instant of the swap there are two complete checkpoints, and the next write works."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process loses nothing that it wrote; time
    call, outcomes, interrupted = 0, set(), True
    while interrupted:
        call += 1
        folder = tmp_path / str(call)
        for step in (0, 1):
            CheckpointFolder(folder).write(generation(step))

        def action(folder: Path = folder, call: int = call) -> None:
            die_at(call)
            CheckpointFolder(folder).write(generation(2))

        interrupted = in_child(action) == 9
        survivor = CheckpointFolder(folder)
        assert survivor.recover()
        step = survivor.read().step
        assert_whole(survivor.read(), step)
        outcomes.add(step)
        assert step == 2 or interrupted
        shutil.rmtree(survivor.path)
        before = survivor.recovered()
        assert before is not None
        assert_whole(before, step - 1)
        survivor.write(generation(3))
        assert_whole(survivor.read(), 3)
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "checkpoint.previous"]
    assert outcomes == {1, 2}
    assert call > 12


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_death_while_recovering_is_recovered_from(tmp_path: Path) -> None:
    """A second kill, during the clean-up after the first, loses nothing."""
    for call in range(1, 8):
        folder = tmp_path / str(call)
        checkpoints = CheckpointFolder(folder)
        checkpoints.write(generation(1))
        shutil.copytree(checkpoints.path, folder / "spare")
        checkpoints.write(generation(2))
        checkpoints.remove_previous()
        # As a kill between the two renames leaves it: the new generation is whole, the old one is set aside.
        (folder / "checkpoint").rename(folder / "checkpoint.new")
        (folder / "spare").rename(folder / "checkpoint.old")

        def action(folder: Path = folder, call: int = call) -> None:
            die_at(call)
            CheckpointFolder(folder).recover()

        in_child(action)
        assert CheckpointFolder(folder).recover()
        assert_whole(CheckpointFolder(folder).read(), 2)


def test_half_a_first_checkpoint_counts_as_none(tmp_path: Path) -> None:
    """A kill during the first write leaves nothing that is read as a checkpoint."""
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.write(generation(1))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.new")
    (tmp_path / "checkpoint.new" / "state.json").unlink()
    assert not checkpoints.recover()
    assert list(tmp_path.iterdir()) == []


def test_mixed_and_damaged_generations_are_refused(tmp_path: Path) -> None:
    """The message names files of two steps, a truncated file and an unknown format."""
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.write(generation(1))
    old = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    checkpoints.write(generation(2))
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(old)
    for damaged in (old, old[:-3]):
        (tmp_path / "checkpoint" / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors has changed since it was written, its digest differs"):
            checkpoints.read()
    (tmp_path / "checkpoint" / "state.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version 99"):
        checkpoints.read()


def test_differences_name_the_path_of_each() -> None:
    """The message lists nested names, both values, and names that one side lacks."""
    there = {"settings": {"seed": 0, "batch_size": 4}, "task": "a"}
    here = {"settings": {"seed": 1, "batch_size": 4}, "task": "a", "extra": 3}
    assert differences(there, here) == ["extra: found nothing, expected 3", "settings.seed: found 0, expected 1"]
    assert differences(there, there) == []


def test_constructing_touches_nothing(tmp_path: Path) -> None:
    """The constructor creates and removes no folder."""
    (tmp_path / "checkpoint.new").mkdir()
    CheckpointFolder(tmp_path)
    CheckpointFolder(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.new"]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": Path.unlink,
    "bit": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x07" + path.read_bytes()[-8:]),
}


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    """One line names both steps and the damaged file, and the next checkpoint keeps the undamaged one."""
    checkpoints = CheckpointFolder(tmp_path)
    for step in (10, 20):
        checkpoints.write(generation(step))
    DAMAGES[damage](checkpoints.path / file)
    recovered = checkpoints.recovered()
    assert recovered is not None
    assert_whole(recovered, 10)
    [message] = caplog.messages
    assert "\n" not in message and file in message and message.endswith("from the checkpoint before, of step 10")
    assert message.startswith("the checkpoint of step 20 cannot be used")
    checkpoints.write(generation(11))
    shutil.rmtree(checkpoints.path)
    before = checkpoints.recovered()
    assert before is not None
    assert_whole(before, 10)


def test_two_damaged_checkpoints_are_one_error(tmp_path: Path) -> None:
    """The error names a file of each, and nothing is removed."""
    checkpoints = CheckpointFolder(tmp_path)
    for step in (1, 2):
        checkpoints.write(generation(step))
    for folder in (checkpoints.path, checkpoints.previous):
        DAMAGES["bit"](folder / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint/model.*; the checkpoint before is damaged too: .*previous/model"):
        checkpoints.recovered()
    assert checkpoints.path.exists() and checkpoints.previous.exists()


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format_version": 3}', '{"format_version": 3, "step": "1"}'])
def test_altered_state_is_a_named_error(tmp_path: Path, content: str) -> None:
    """A state file with other content raises a ValueError with the name of the file, never a KeyError."""
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.write(generation(1))
    (checkpoints.path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json"):
        checkpoints.recovered()


def test_flips_and_exchanged_blocks_of_a_large_file_are_found(tmp_path: Path) -> None:
    """The digest covers all blocks of a file, the rest after the last block, and the order of the blocks."""
    checkpoints = CheckpointFolder(tmp_path)
    large = torch.randn(50_001, generator=torch.Generator().manual_seed(0))
    checkpoints.write(Checkpoint(1, {"model": {"weight": large}}, {}))
    file = tmp_path / "checkpoint" / "model.safetensors"
    content, block, rng = file.read_bytes(), 2**16, random.Random(0)
    damages = [content[block : 2 * block] + content[:block] + content[2 * block :]]
    for place in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(30))]:
        damages.append(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    for damaged in damages:
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="its digest differs"):
            checkpoints.read()
    file.write_bytes(content)
    assert torch.equal(checkpoints.read().tensors["model"]["weight"], large)
