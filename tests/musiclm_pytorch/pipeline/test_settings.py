"""Single settings of presets, from texts of a command line and from YAML files."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from audiolm_pytorch.training import LoopSettings
from musiclm_pytorch.pipeline.musicgen_presets import MUSICGEN_PRESETS
from musiclm_pytorch.pipeline.presets import PRESETS, preset_named
from musiclm_pytorch.pipeline.settings import read_settings, setting_paths, with_settings
from musiclm_pytorch.pipeline.trainers import loop_settings

TINY = preset_named("tiny")


@pytest.mark.parametrize("preset", [*PRESETS.values(), *MUSICGEN_PRESETS.values()], ids=lambda preset: preset.name)
def test_every_setting_can_be_read_from_a_file(preset, tmp_path: Path) -> None:
    """The settings of a preset as YAML, read over the same preset, are this preset."""
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(asdict(preset)))
    settings = read_settings(tmp_path / "all.yaml")
    assert set(settings) == set(setting_paths(preset))
    assert with_settings(preset, settings) == preset


@pytest.mark.parametrize(
    ("name", "text"),
    [("precision", "fp16"), *((name, "true") for name in ("checkpoint_blocks", "compile", "fsdp"))],
)
def test_settings_of_devices_reach_the_training_loop(name: str, text: str) -> None:
    """Every model of a preset has them."""
    for part in ("codec", "semantic_tokenizer", "mulan", "semantic", "coarse", "fine"):
        run = getattr(with_settings(TINY, {f"{part}.run.{name}": text}), part).run
        assert LoopSettings(**loop_settings(run)) == replace(
            LoopSettings(**loop_settings(getattr(TINY, part).run)), **{name: getattr(run, name)}
        )
        assert getattr(run, name) in (True, "fp16")


def test_texts_and_values_of_a_file_have_the_same_effect(tmp_path: Path) -> None:
    """Numbers, null, lists, texts, and 1e-4, which is a text in YAML; settings that depend on each other."""
    (tmp_path / "some.yaml").write_text(
        "semantic: {dim: 258, heads: 6, run: {learning_rate: 1e-4, precision: fp32}}\n"
        "coarse: {guide_semantic: false, objective: {level_weights: [1, 0.5]}}\n"
        "mulan: {chunk_size: 8}\nnum_coarse_quantizers: 3\n"
    )
    from_file = with_settings(TINY, read_settings(tmp_path / "some.yaml"))
    texts = {
        **{"semantic.dim": "258", "semantic.heads": "6", "semantic.run.learning_rate": "1e-4"},
        **{"semantic.run.precision": "fp32", "coarse.guide_semantic": "false", "mulan.chunk_size": "8"},
        **{"coarse.objective.level_weights": "[1, 0.5]", "num_coarse_quantizers": "3"},
    }
    assert with_settings(TINY, texts) == from_file
    assert (from_file.semantic.dim, from_file.semantic.heads, from_file.num_coarse_quantizers) == (258, 6, 3)
    assert from_file.semantic.run == replace(TINY.semantic.run, learning_rate=1e-4, precision="fp32")
    assert from_file.coarse.objective.level_weights == (1, 0.5) and from_file.mulan.chunk_size == 8
    assert from_file.fine == TINY.fine
    assert with_settings(from_file, {"mulan.chunk_size": "null"}).mulan.chunk_size is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("semantic.run.learning_rat", "1", "no setting semantic.run.learning_rat; use semantic.run.learning_rate$"),
        ("fine.run.learnig_rate", "1", "no setting fine.run.learnig_rate; use fine.run.learning_rate$"),
        ("semantic.learning_rate", "1", "use semantic.run.learning_rate$"),
        ("semantic", "1", "no setting semantic; use semantic.dim"),
        ("semantic.dim.x", "1", "no setting semantic.dim.x; use semantic.dim"),
        ("zzz", "1", "no setting zzz; use a setting that --print-config lists"),
        ("semantic.dim", "x", "wrong setting semantic.dim: StageConfig: dim must be int, got 'x'"),
        ("semantic.dim", "1.5", "dim must be int, got 1.5"),
        ("semantic.dim", "255", "dim must be a multiple of heads"),
        ("semantic_tokenizer.layer", "99", "layer must be from 1 to depth, got layer=99 and depth=4"),
        ("semantic_tokenizer.layer", "0", "layer must be from 1 to depth, got layer=0"),
        ("num_coarse_quantizers", "4", "at least 1 and below codec.num_quantizers=4, got 4"),
        ("codec.num_quantizers", "2", "below codec.num_quantizers=2, got 2"),
        ("semantic.run.learning_rate", "-1", "wrong setting semantic.run.learning_rate: .*above 0"),
        ("semantic.run.learning_rate", "Infinity", "must be a finite number"),
        ("semantic.run.precision", "fp8", "precision must be"),
        ("semantic.run.seconds", "0", "seconds is 0"),
        ("mulan.patch_dropout", "2", "patch_dropout must be in 0..1"),
        ("fine.objective.input_noise", "2", "wrong setting fine.objective.input_noise: .* must be in 0..1"),
    ],
)
def test_wrong_settings_are_named(path: str, value: str, message: str) -> None:
    """The message has one line, with the path and what is needed."""
    with pytest.raises(ValueError, match=message) as raised:
        with_settings(TINY, {path: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "must contain settings"), ("a: [", "not a YAML file"), ("a: &x 1\nb: 2\na\n", "not a YAML file")],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    """Lists and broken YAML are refused in one line; an empty file changes nothing."""
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_settings(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)
    file.write_text("")
    assert with_settings(TINY, read_settings(file)) == TINY
    with pytest.raises(ValueError, match="cannot read .*none.yaml"):
        read_settings(tmp_path / "none.yaml")
