"""`musiclm info`, `play` and `completion`."""

import json
import shlex
import subprocess

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from musiclm_pytorch.cli import info as info_command, play as play_command


def test_info_of_the_installation(musiclm_command, capsys):
    """Versions, devices, bundled models with their licences, and known instruments and words."""
    assert musiclm_command("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "cpu" in facts["devices"]
    assert facts["bundled models"]["tiny"]["licence"].startswith("mit")
    words = set(facts["words of tiny"])
    assert {"jig", "slow"} <= words and "flute" in facts["instruments of tiny"]
    assert all(word in words for instrument in facts["instruments of tiny"] for word in instrument.split())
    assert musiclm_command("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    order = ["bundled models", "instruments of tiny", "words of tiny", "devices", "versions"]
    assert [line for line in lines if line in order] == order and "not installed" not in lines


def test_missing_optional_packages_are_one_line(musiclm_command, monkeypatch, capsys):
    """They come last, without versions."""
    monkeypatch.setattr(info_command, "_dependencies", lambda: {"numpy": "2.0", "peft": None, "onnx": None})
    assert musiclm_command("info") == 0
    assert capsys.readouterr().out.endswith("  numpy    2.0\noptional packages that can be added\n  peft, onnx\n")


def test_a_missing_file_is_no_missing_folder(musiclm_command, tmp_path, capsys):
    """A name with a suffix is perhaps that of a file."""
    for source, message in {tmp_path / "texts.txt": "file or folder", "tiney": "folder"}.items():
        assert musiclm_command("info", source) == 2
        assert f"there is no {message} {source}; pass" in capsys.readouterr().err


def test_only_known_options_of_a_comment_are_in_the_command(musiclm_command, tmp_path, capsys):
    """Anyone can write a comment; a comment of the web page, which has no options, is not repeated."""
    request = {"text": "a $(jig)", "seed": 3, "options": {"out": ".bashrc", "mix": [[0.5, {"a": 1}]]}}
    write_audio(tmp_path / "a.wav", torch.zeros(16000), 16000, comment=json.dumps(request))
    assert musiclm_command("info", tmp_path / "a.wav", "--json") == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert shlex.split(command) == ["musiclm", "generate", "a $(jig)", "--seed", "3", "--mix", "0.5", "{'a': 1}"]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_info_reads_what_generate_wrote(musiclm_command, tmp_path, capsys, suffix):
    """Text, seed and model of a file; the comment of another program is printed as it is."""
    request = {"seed": 3, "model": "tiny", "text": "un ton \u7b1b"}
    for comment in (json.dumps(request, ensure_ascii=suffix == "mp3"), "by hand"):
        write_audio(tmp_path / f"a.{suffix}", torch.zeros(16000), 16000, comment=comment)
        assert musiclm_command("info", tmp_path / f"a.{suffix}", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["sample_hz"], facts["channels"], facts["seconds"]) == (16000, 1, 1.0)
        assert facts.get("generated") == (request if comment != "by hand" else None)
    assert facts["comment"] == "by hand"


def test_info_of_a_model(musiclm_command, micro_run, tmp_path, capsys):
    """Class, parts and words of a model folder, of a run, and of a bundled module; other folders are refused."""
    for source in (micro_run, micro_run / "model"):
        assert musiclm_command("info", source, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["class"] == "MusicLM" and "coarse" in facts["parts"] and "tone" in facts["words"]
    assert musiclm_command("info", "codec_16khz") == 0
    assert "SoundStream" in capsys.readouterr().out
    assert musiclm_command("info", tmp_path) == 2
    assert "is no audio file and contains no model" in capsys.readouterr().err


def test_play_uses_a_player_of_this_machine(musiclm_command, write_tone, tmp_path, monkeypatch, capfd):
    """The first installed player that reads the format gets an absolute path; its failure is one line."""
    player, played = tmp_path / "bin" / "aplay", tmp_path / "played"
    player.parent.mkdir()
    player.write_text(f'#!/bin/sh\necho "$@" > {played}\n')
    player.chmod(0o755)
    monkeypatch.setattr(play_command.shutil, "which", lambda name: player if name == "aplay" else None)
    monkeypatch.setenv("PATH", f"{player.parent}:/bin:/usr/bin")
    tone = write_tone("-tone.wav")
    monkeypatch.chdir(tmp_path)
    assert musiclm_command("play", "./-tone.wav") == 0
    assert played.read_text() == f"-q {tone}\n"
    assert musiclm_command("play", write_tone("tone.flac")) == 2
    assert "none of ffplay, mpv, pw-play, paplay, afplay, play is installed; install" in capfd.readouterr().err
    player.write_text("#!/bin/sh\necho no sound card >&2; exit 1\n")
    assert musiclm_command("play", tone) == 2
    assert capfd.readouterr().err.endswith("no sound card; check the sound device of this machine\n")
    assert musiclm_command("play", tmp_path / "none.wav") == 2
    assert "none.wav: no such file" in capfd.readouterr().err


def test_play_opens_the_default_program_of_windows(musiclm_command, write_tone, monkeypatch):
    """It is used if no player is installed."""
    opened = []
    monkeypatch.setattr(play_command.shutil, "which", lambda name: None)
    monkeypatch.setattr(play_command.os, "startfile", opened.append, raising=False)
    tone = write_tone("tone.flac")
    assert musiclm_command("play", tone) == 0
    assert opened == [tone]


@pytest.mark.slow
def test_completion_of_bash(musiclm_command, tmp_path, capfd):
    """The script has the commands and options, and bash accepts it."""
    assert musiclm_command("completion", "bash") == 0
    script = capfd.readouterr().out
    assert all(word in script for word in ("--num-samples", "doctor", "encode"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert musiclm_command("completion", "fisch") == 2
    assert "'fisch'" in capfd.readouterr().err
