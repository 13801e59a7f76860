"""Commands on a full disk: one line on standard error, exit status 2, and no half-written file."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.bad_input import listing
from tests.helpers.full_disk import full_disk

SHORT = ("--seconds", "0.5", "--num-samples", "2")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_generate(
    musiclm_command: Callable[..., int], micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, suffix: str
) -> None:
    """Music that does not fit on the disk leaves no file, in any format."""
    words = ("generate", "a low tone", "--model", micro_run / "model", *SHORT, "--out", tmp_path / f"a.{suffix}")
    with full_disk(2000):
        assert musiclm_command(*words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("musiclm: ") and errors.count("\n") == 1
    assert f"a.{suffix}: the file cannot be written" in errors and "check the free space" in errors
    assert listing(tmp_path) == {}


@pytest.mark.slow
def test_stream(
    musiclm_command: Callable[..., int], micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A stream ends with an error where the disk is full; what was written before stays, also an older file."""
    words = ("generate", "a low tone", "--model", micro_run / "model", *SHORT, "--stream", "--out", tmp_path / "a.wav")
    with full_disk(2000):
        assert musiclm_command(*words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("musiclm: ") and errors.count("\n") == 1
    assert f"cannot write to {tmp_path / 'a.wav'}: File too large" in errors
    (tmp_path / "a.wav").write_bytes(b"older")
    with full_disk(2000):
        assert musiclm_command(*words) == 2
    assert (tmp_path / "a.wav").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1
    assert musiclm_command(*words) == 0
    assert (tmp_path / "a.wav").read_bytes()[:4] == b"RIFF" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("word", ["encode", "decode"])
def test_codec(
    musiclm_command: Callable[..., int],
    micro_data: Path,
    micro_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    word: str,
) -> None:
    """Codes and decoded waves that do not fit on the disk leave no file."""
    codec, source = micro_run / "model" / "codec", micro_data / "00.wav"
    if word == "decode":
        assert musiclm_command("codec", "encode", source, "--codec", codec, "--out", tmp_path / "a.safetensors") == 0
        source = tmp_path / "a.safetensors"
    out = tmp_path / ("b.wav" if word == "decode" else "b.safetensors")
    capsys.readouterr()
    with full_disk(200):
        assert musiclm_command("codec", word, source, "--codec", codec, "--out", out) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("musiclm: ") and errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ([source.name] if word == "decode" else [])


def test_export_keeps_the_old_model(
    musiclm_command: Callable[..., int], micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A model that is exported over another one replaces it only if it fits."""
    shutil.copytree(micro_run / "model", tmp_path / "model")
    before = listing(tmp_path / "model")
    with full_disk(3000):
        assert musiclm_command("export", "--run", micro_run, "--out", tmp_path / "model") == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "cannot write" in errors and str(tmp_path / "model") in errors
    assert {name: time for name, time in listing(tmp_path / "model").items() if "." in name} == {
        name: time for name, time in before.items() if "." in name
    }


@pytest.mark.slow
def test_train_continues_when_there_is_space(
    musiclm_command: Callable[..., int],
    micro_data: Path,
    micro_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """A step that cannot write its checkpoint ends the command, and the same command continues later."""
    shutil.copytree(micro_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fine")
    words = ("train", "fine", "--preset", "micro", "--data", micro_data, "--out", tmp_path / "run")
    with full_disk(10_000):
        assert musiclm_command(*words) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "cannot write" in errors and "model.safetensors" in errors
    assert musiclm_command(*words) == 0
    assert not list((tmp_path / "run").rglob(".writing-*"))


def test_standard_output(
    musiclm_command: Callable[..., int],
    micro_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A report that cannot be printed is an error of the command, which Python does not report a second time."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert musiclm_command("export", "--run", micro_run, "--out", tmp_path / "model") == 2
        full.flush()
    errors = capsys.readouterr().err
    assert errors == "musiclm: cannot write to standard output: No space left on device\n"


def test_closed_standard_output(
    musiclm_command: Callable[..., int],
    micro_data: Path,
    micro_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Silent if the shell has closed standard output (>&-), and if its reader has ended, as in a pipe to head."""
    words = ("codec", "evaluate", micro_data / "00.wav", "--codec", micro_run / "model" / "codec", "--seconds", "0.5")
    monkeypatch.setattr(sys, "stdout", None)
    assert musiclm_command(*words) == 0
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert musiclm_command(*words) == 141
    assert capsys.readouterr().err == ""
