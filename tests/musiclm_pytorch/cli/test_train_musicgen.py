"""`musiclm train musicgen`: new models, interrupted runs, fine-tuning, stereo, mixed clips, two processes."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from musiclm_pytorch import MusicGen
from musiclm_pytorch.cli import main
from musiclm_pytorch.musicgen.trainer import MusicGenTrainer
from musiclm_pytorch.pipeline import estimate_musicgen as estimate_module
from musiclm_pytorch.pipeline.musicgen_presets import MUSICGEN_PRESETS
from musiclm_pytorch.pipeline.presets import RunConfig
from tests.helpers.bad_input import bad_input, check_bad_input
from tests.helpers.processes import run_two_processes
from tests.helpers.small_codecs import tiny_codec

RUN = RunConfig(6, 4, 1.0, 1e-3, warmup_steps=2, precision="fp32", checkpoint_every_steps=2)
# The schedule of AudioGen, whose state is in the checkpoints.
MICRO = replace(
    MUSICGEN_PRESETS["tiny"], name="micro", schedule="inverse_sqrt", dim=32, depth=1, heads=2, num_codebooks=2, run=RUN
)
# Without anything random, so that two processes can compute the same as one.
EXACT = replace(MICRO, name="exact", cond_drop_prob=0.0, melody_drop_prob=0.0, text_drop_prob=0.0, word_dropout=0.0)


@pytest.fixture
def train(musiclm_command, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`musiclm train musicgen` with the preset micro on captioned tones, as a function of the run and more words."""
    monkeypatch.setitem(MUSICGEN_PRESETS, "micro", MICRO)
    tiny_codec().eval().save_pretrained(tmp_path / "codec")

    def command(out: str, *words: Any, codec: bool = True) -> int:
        options = ["--preset", "micro", "--data", micro_data, "--out", tmp_path / out]
        return musiclm_command(
            "train", "musicgen", *options, *(["--codec", tmp_path / "codec"] if codec else []), *words
        )

    return command


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All trained weights of a run: language model and text encoder."""
    model = MusicGen.from_pretrained(run)
    return dict(model.transformer.state_dict()) | dict(model.text_conditioner.state_dict())


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@bad_input(
    """
unknown preset | train musicgen --data DATA --out TMP/out --preset huge | no preset 'huge'.*tiny, small
no data | train musicgen --out TMP/out | --data is missing
no out | train musicgen --data DATA | --out is missing
negative workers | train musicgen --data DATA --out TMP/out --num-workers -1 | --num-workers must be at least 0
missing data | train musicgen --data TMP/none --out TMP/out | TMP/none: no such folder or manifest
zero batch | train musicgen --data DATA --out TMP/out --run.batch-size 0 | batch_size is 0; it must be 1 or more
zero rank | train musicgen --data DATA --out TMP/out --from X --lora-rank 0 | --lora-rank must be at least 1
rank without a model | train musicgen --data DATA --out TMP/out --lora-rank 2 | --lora-rank needs --from
frozen without a model | train musicgen --data DATA --out TMP/out --freeze heads | --freeze needs --from
no probability | train musicgen --data DATA --out TMP/out --mix-prob NaN | mix_prob must be a number, got NaN
zero rate | train musicgen --data DATA --out TMP/out --run.learning-rate 0 | learning_rate is 0; it must be above 0
zero seconds | train musicgen --data DATA --out TMP/out --run.seconds 0 | seconds is 0; it must be above 0
zero scale | train musicgen --data DATA --out TMP/out --scale 0 | scale must be positive
codec of a model | train musicgen --data DATA --out TMP/out --from X --codec Y | --codec is for a new model
unknown model | train musicgen --data DATA --out TMP/out --from X | there is no folder X
no MuLaN | train musicgen --data DATA --out TMP/out --mulan X | there is no folder X
folder of somebody else | train musicgen --data DATA --out DATA | contains files that do not belong to a run
no such GPU | train musicgen --data DATA --out TMP/out --dry-run-device a1000 | no estimate for the device 'a1000'
not the first word | train --preset tiny musicgen --data DATA --out TMP/out | musicgen must be the first word
"""
)
def test_wrong_words(musiclm_command, micro_data: Path, tmp_path: Path, words, message, capfd) -> None:
    """One line on standard error, and no file is written."""
    check_bad_input(musiclm_command, words, message, {"DATA": micro_data, "TMP": tmp_path}, capfd)


def test_dry_run_writes_nothing(train, tmp_path: Path, capsys, monkeypatch) -> None:
    """The table has the parameters and tokens of the training; on a GPU, the time follows from the operations."""
    devices = []

    def seconds_per_crop(work, max_crops, device, assumed=None):
        devices.append(assumed)
        work(1)
        return 2.0

    monkeypatch.setattr(estimate_module, "seconds_per_crop", seconds_per_crop)
    codec = tiny_codec()
    num_tokens = 6 * 4 * 2 * codec.target_sample_hz // codec.downsample_factor  # steps, crops of 1 s, levels
    for words in (["--dry-run"], ["--dry-run-device", "a100"]):
        assert train("dry", *words) == 0
        lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
        assert {"tokens", "musicgen", "total"} < lines.keys()
        assert lines["musicgen"][2] == f"{num_tokens:,}"
        # 24 crops of 1 s from files of 9 s; 8 validations with one held-out file, at a third of the time of a crop
        assert lines["musicgen"][3:5] == [f"{24 / 9:.3g}", f"{math.log(codec.codebook_size):.2f}"]
        assert lines["musicgen"][-2:] == [f"{2.0 * (24 + 8 / 3):.1f}", "s"]
    assert devices == [None, None, "a100", "a100", "a100"]
    assert not (tmp_path / "dry").exists()


@pytest.mark.slow
def test_new_model_generates_and_continues_bit_for_bit(
    train, musiclm_command, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A run that stops after 3 steps and continues has the weights of an uninterrupted run, text encoder included."""
    assert train("whole") == 0
    assert "6 steps" in capsys.readouterr().out
    words = ("generate", "a low tone", "--model", tmp_path / "whole", "--seconds", 0.2, "--melody")
    assert musiclm_command(*words, tmp_path / "whole" / "samples" / "1.wav", "--out", tmp_path / "a.wav") == 0
    steps = MusicGenTrainer.train
    monkeypatch.setattr(MusicGenTrainer, "train", lambda trainer: steps(trainer, 3))
    train("parts")
    monkeypatch.undo()
    monkeypatch.setitem(MUSICGEN_PRESETS, "micro", MICRO)
    assert not (tmp_path / "parts" / "musicgen" / "musicgen").exists()
    assert train("parts") == 0
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_fine_tuning(train, tmp_path: Path, capsys) -> None:
    """Complaint: fine-tuning command breaks. All weights, low-rank updates, stereo, mixed clips, and wrong options."""
    assert train("base") == 0
    base = weights(tmp_path / "base")
    assert train("full", "--from", tmp_path / "base", codec=False) == 0
    changed = {name for name, value in weights(tmp_path / "full").items() if not torch.equal(value, base[name])}
    assert {"embedding.weight", "heads.0.weight", "tower.embedding.weight"} <= changed
    assert train("frozen", "--from", tmp_path / "base", "--freeze", "embedding", "heads.0", codec=False) == 0
    changed = {name for name, value in weights(tmp_path / "frozen").items() if not torch.equal(value, base[name])}
    assert "heads.1.weight" in changed
    assert not changed & {"embedding.weight", "heads.0.weight", "tower.embedding.weight"}
    for words in ((), ("--dry-run",)):
        assert train("wrong", "--from", tmp_path / "base", "--freeze", "heads.3", *words, codec=False) == 2
        assert "no trainable parameter has the name 'heads.3'" in capsys.readouterr().err
    assert not (tmp_path / "wrong" / "tokens").exists()
    words = ("--freeze", "transformer", "--dry-run")
    assert train("dry", "--from", tmp_path / "base", *words, codec=False) == 0
    assert "musicgen" in capsys.readouterr().out
    assert train("dry", "--from", tmp_path / "base", *words[:2], "--dry-run-device", "a100", codec=False) == 2
    assert "is estimated only on this machine" in capsys.readouterr().err
    assert train("lora", "--from", tmp_path / "base", "--lora-rank", 2, "--mix-prob", 0.5, codec=False) == 0
    lora = weights(tmp_path / "lora")
    changed = {name for name, value in lora.items() if not torch.equal(value, base[name])}
    assert "heads.0.weight" in changed
    assert not changed & {"embedding.weight", "tower.embedding.weight"}
    assert not (tmp_path / "lora" / "tokens").exists()
    assert train("stereo", "--from", tmp_path / "base", "--stereo", codec=False) == 0
    assert MusicGen.from_pretrained(tmp_path / "stereo")("a low tone", seconds=0.2, seed=0).shape == (1, 2, 3200)
    assert train("base", "--scale", 2) == 2
    assert "--allow-changed" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_equal_one_process_with_twice_the_batch(
    train, micro_data: Path, tmp_path: Path, monkeypatch
) -> None:
    """The weights of two processes and of one with their joint batch agree up to rounding."""
    monkeypatch.setitem(MUSICGEN_PRESETS, "micro", EXACT)
    assert train("one") == 0
    done = run_two_processes(__file__, micro_data, tmp_path / "codec", tmp_path / "two")
    assert (tmp_path / "two" / "musicgen" / "musicgen" / "musicgen.json").is_file(), done.stderr[-3000:]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    MUSICGEN_PRESETS["micro"] = EXACT
    data, codec, run = sys.argv[1:]
    words = ["--preset", "micro", "--data", data, "--codec", codec, "--out", run, "--run.batch-size", "2"]
    sys.exit(main(["train", "musicgen", *words]))
