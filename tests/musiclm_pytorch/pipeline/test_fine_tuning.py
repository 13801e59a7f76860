"""Training of models further: `musiclm train STEP --from MODEL`, LoRA and freezing."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.nn.lora import load_lora
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.semantic import SemanticTokenizer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.fine_tuning import FineTuning

STAGES = ("semantic", "coarse", "fine")
PARTS = {"codec": Codec, "semantic-tokenizer": SemanticTokenizer, "mulan": torch.nn.Module}


def weights(model: MusicLM, stage: str) -> dict[str, torch.Tensor]:
    return model.audio_lm.stages[stage].state_dict()


def changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.mark.slow
def test_one_stage_is_trained_further(
    micro_run: Path, micro_data: Path, tmp_path: Path, musiclm_command: Callable[..., int]
) -> None:
    """The new model has the trained stage, the other stages of the first model, and the same tokenizers."""
    model, out = micro_run / "model", tmp_path / "out"
    options = ["--preset", "micro", "--data", micro_data, "--out", out, "--from", model]
    assert musiclm_command("train", "coarse", *options, "--coarse.text-prob", 0.9, "--freeze", "embedding") == 0
    first, second = MusicLM.from_pretrained(model), MusicLM.from_pretrained(out / "model")
    assert not changed(weights(first, "semantic"), weights(second, "semantic"))
    assert not changed(weights(first, "fine"), weights(second, "fine"))
    found = changed(weights(first, "coarse"), weights(second, "coarse"))
    assert found and not any("embedding" in name for name in found)
    quantizers = first.mulan_embed_quantizer, second.mulan_embed_quantizer
    assert quantizers[0].fingerprint() == quantizers[1].fingerprint()
    tables = [{name: table.weight for name, table in quantizer.tables.items()} for quantizer in quantizers]
    assert changed(*tables) == {"coarse"}
    assert second.audio_lm.sampling == first.audio_lm.sampling
    assert (out / "coarse" / "loss.svg").is_file() and list((out / "samples").glob("*.wav"))
    names = {path.name for path in (out / "coarse" / "samples").iterdir()}
    assert names == {f"1_step_00000{step:02d}.wav" for step in (6, 12)}
    # the same folder continues with the other stages, but not with another model
    assert musiclm_command("train", "all", *options, "--coarse.text-prob", 0.9, "--freeze", "embedding") == 0
    third = MusicLM.from_pretrained(out / "model")
    assert not changed(weights(second, "coarse"), weights(third, "coarse"))
    assert changed(weights(first, "semantic"), weights(third, "semantic"))
    assert musiclm_command("train", "fine", *options, "--coarse.text-prob", 0.9) != 0


@pytest.mark.parametrize("options", [(), ("--lora-rank", 2), ("--freeze", "embedding", "feed_forward")])
def test_the_dry_run_counts_what_is_trained(
    options: tuple[str, ...], micro_run: Path, micro_data: Path, tmp_path: Path, musiclm_command, capsys
) -> None:
    """Parameters of the stages of the model, not of the preset; other parts are pretrained; nothing is written."""
    model, out = MusicLM.from_pretrained(micro_run / "model"), tmp_path / "out"
    words = ["train", "all", "--preset", "micro", "--data", micro_data, "--out", out, "--from", micro_run / "model"]
    assert musiclm_command(*words, "--dry-run", "--semantic.depth", 5, *options) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    for stage in STAGES:
        weights = dict(model.audio_lm.stages[stage].named_parameters())
        expected = sum(weight.numel() for weight in weights.values())
        count = int(rows[stage][1].replace(",", ""))
        assert count == expected if not options else 0 < count < expected
    assert {rows[part][-1] for part in ("codec", "semantic-tokenizer", "mulan", "quantizer")} == {"pretrained"}
    assert not out.exists()


@pytest.mark.slow
def test_updates_of_low_rank_are_small_and_merged(
    micro_run: Path, micro_data: Path, tmp_path: Path, musiclm_command: Callable[..., int], caplog
) -> None:
    """A model has merged weights; the updates alone, added to the first model, are the same model."""
    model, out = micro_run / "model", tmp_path / "out"
    options = ["--preset", "micro", "--data", micro_data, "--out", out, "--from", model]
    assert musiclm_command("train", "all", *options, "--lora-rank", 2, "--coarse.text-prob", 0.5) == 0
    unread = [text for text in caplog.messages if "without the captions" in text]
    assert [text.split()[1] for text in unread] == ["semantic", "fine"]  # the preset has text_prob=0
    first, second = MusicLM.from_pretrained(model), MusicLM.from_pretrained(out / "model")
    for stage in STAGES:
        found = changed(weights(first, stage), weights(second, stage))
        linear = {
            name for name, layer in first.audio_lm.stages[stage].named_modules() if type(layer) is torch.nn.Linear
        }
        assert found == {f"{name}.weight" for name in linear}
        load_lora(first.audio_lm.stages[stage], out / stage / "lora")
        for name, tensor in weights(first, stage).items():
            torch.testing.assert_close(tensor, weights(second, stage)[name], rtol=2e-3, atol=1e-4)  # fp16
    with pytest.raises(ValueError, match="LoRA updates of a CoarseTransformer; pass those of a SemanticTransformer"):
        load_lora(first.audio_lm.stages["semantic"], out / "coarse" / "lora")
    with pytest.raises(ValueError, match="contains no LoRA updates"):
        load_lora(first.audio_lm.stages["semantic"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["codec", "semantic-tokenizer", "mulan"])
def test_parts_are_trained_further(
    step: str, micro_run: Path, micro_data: Path, tmp_path: Path, musiclm_command: Callable[..., int]
) -> None:
    """A codec, a semantic tokenizer and a MuLaN start from given weights; few steps change them little."""
    source = micro_run / step / "model"
    options = ["--preset", "micro", "--data", micro_data, "--out", tmp_path / "out", "--from", source]
    assert musiclm_command("train", step, *options) == 0
    first, second = (load_module(folder).state_dict() for folder in (source, tmp_path / "out" / step / "model"))
    compared = [name for name in changed(first, second) if first[name].ndim > 1 and "centroids" not in name]
    assert compared
    distances = [float((first[name] - second[name]).norm() / first[name].norm()) for name in compared]
    assert sorted(distances)[len(distances) // 2] < 0.5  # new weights have a distance of about 1.4


def test_wrong_starts_are_named(
    micro_run: Path, micro_data: Path, tmp_path: Path, capsys, musiclm_command, monkeypatch
) -> None:
    """Options that need a model, models that no step trains, and unknown names of parameters."""
    options = ["--preset", "micro", "--data", micro_data, "--out", tmp_path / "out"]
    start = ["--from", micro_run / "model"]
    for words, message in (
        (["semantic", "--lora-rank", 2], "--lora-rank and --freeze need --from"),
        (["semantic", "--lora-rank", 0, *start], "--lora-rank must be at least 1"),
        (["quantizer", *start], "the step quantizer trains no model further"),
        (
            ["codec", "--lora-rank", 2, "--from", micro_run / "codec" / "model"],
            "lora_rank must be at least 1, and needs",
        ),
        (["all", "--codec", "codec_16khz", *start], "got pretrained parts and a MusicLM"),
        (["melody-coarse", "--lora-rank", 2, *start], "the step melody-coarse trains all weights; leave out"),
    ):
        assert musiclm_command("train", *words, *options) != 0
        assert message in capsys.readouterr().err
    for file in micro_data.glob("*.wav"):
        shutil.copy(file, tmp_path)
    options = ["--preset", "micro", "--data", tmp_path, "--out", tmp_path / "out", "--coarse.text-prob", 0.9]
    assert musiclm_command("train", "all", *options, *start) != 0
    assert "has no captions, but the step coarse needs them; write a.txt beside a.wav" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing is computed before
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="LoRA needs peft"):
        FineTuning(model=MusicLM.from_pretrained(micro_run / "model"), lora_rank=2)
    with pytest.raises(ValueError, match="a Linear cannot be trained further"):
        FineTuning(model=torch.nn.Linear(2, 2))
