"""Tokens of a data set by several processes, `musiclm tokenize`, and training with these tokens."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiolm_pytorch.data.manifest import training_items
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.training.distributed import create_accelerator
from musiclm_pytorch.cli import main
from musiclm_pytorch.pipeline.builders import build_codec, build_mulan, build_semantic_tokenizer
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.token_shards import compute_token_split
from tests.helpers.micro import MICRO, write_clips

NUM_CLIPS = 40  # in three chunks


def micro_parts() -> dict[str, Any]:
    """Untrained models of the preset of the tests."""
    torch.manual_seed(0)
    mulan = build_mulan(MICRO, ["a low tone", "a high tone, take 1"])
    parts = {"codec": build_codec(MICRO), "semantic_tokenizer": build_semantic_tokenizer(MICRO), "mulan": mulan}
    return {name: part.eval() for name, part in parts.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(action: Callable[[], object]) -> int:
    """Run in a forked process; return its id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.slow
def test_killed_processes_continue_to_the_tokens_of_a_straight_run(tmp_path: Path) -> None:
    """Two processes that share the work are killed at random instants; the rest is that of one process, bit for bit."""
    torch.set_num_threads(1)
    items, parts = training_items(write_clips(tmp_path / "clips", NUM_CLIPS), None), micro_parts()
    accelerator = create_accelerator()
    started = time.monotonic()
    compute_token_split(tmp_path / "straight", items, **parts, accelerator=accelerator)
    seconds, rng = time.monotonic() - started, random.Random(0)

    def compute() -> None:
        compute_token_split(tmp_path / "killed", items, **parts, accelerator=accelerator)

    for _ in range(4):
        children = [start(compute), start(compute)]
        for child in children:
            time.sleep(rng.uniform(0, 0.4) * seconds)
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
    children = [start(compute), start(compute)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len(list((tmp_path / "straight" / "train").glob("chunk-*"))) == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_train_uses_the_tokens_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes write what one process writes; a run with the same data and parts does not compute them again."""
    data, parts = write_clips(tmp_path / "clips", 20), micro_parts()
    options = []
    for name, part in parts.items():
        save_module(part, tmp_path / name)
        options += [f"--{name.replace('_', '-')}", str(tmp_path / name)]
    words = ["tokenize", "--data", str(data), *options, "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    printed = capsys.readouterr()
    assert "one/train: " in printed.out and "not in the training captions" not in printed.err
    assert main([*words, str(tmp_path / "two"), "--num-processes", "2"]) == 0
    assert "two/train: " in capsys.readouterr().out
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    pretrained = {name.replace("_", "-"): part for name, part in parts.items()}
    run = Pipeline(MICRO, data=data, out=tmp_path / "run", pretrained=pretrained, tokens_folder=tmp_path / "two")
    list(run.run("tokens"))
    assert [len(shards) for shards in run.tokens()] == [len(run.train_items), len(run.valid_items)]
    assert [path.name for path in (tmp_path / "run" / "tokens").iterdir()] == ["report.json"]
    assert [report.summary for report in run.run("tokens")][-1] == "done before"
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text().replace("low", "deep"))
    other = Pipeline(MICRO, data=data, out=tmp_path / "other", pretrained=pretrained, tokens_folder=tmp_path / "two")
    with pytest.raises(ValueError, match="contains records of other arguments"):
        list(other.run("tokens"))


def test_a_model_or_each_part_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the options that are missing."""
    assert main(["tokenize", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--codec", "codec_16khz"]) == 2
    assert "--model or --semantic-tokenizer, --mulan is missing" in capsys.readouterr().err
