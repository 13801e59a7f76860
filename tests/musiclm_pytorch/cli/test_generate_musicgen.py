"""`musiclm generate` with MusicGen models."""

from pathlib import Path

import pytest
import soundfile

pytest.importorskip("transformers")

from musiclm_pytorch.musicgen.musicgen import MusicGen
from tests.helpers.published_musicgen import write_musicgen


@pytest.mark.slow
def test_music_is_written_to_a_file_and_streamed(musiclm_command, tmp_path: Path, capsys) -> None:
    """The kind of the model is found in its folder, in every format; a melody needs a model with a melody."""
    folder = write_musicgen(tmp_path / "model", melody=True)
    words = ("generate", "slow piano", "--model", folder, "--seconds", 0.5, "--seed", 3)
    assert musiclm_command(*words, "--out", tmp_path / "a.wav") == 0
    wave, sample_hz = soundfile.read(tmp_path / "a.wav")
    assert sample_hz == 32000
    assert len(wave) == 16000
    assert musiclm_command(*words, "--out", tmp_path / "b.wav", "--stream") == 0
    assert abs(soundfile.read(tmp_path / "b.wav")[0] - wave).max() < 1e-3
    melody = ("--melody", tmp_path / "a.wav", "--continue-from", tmp_path / "a.wav", "--continue-seconds", 0.3)
    melody += ("--seconds", 1)
    assert musiclm_command(*words[:4], *melody, "--out", tmp_path / "c.wav") == 0
    assert len(soundfile.read(tmp_path / "c.wav")[0]) == 32000
    capsys.readouterr()
    assert musiclm_command("info", tmp_path / "c.wav") == 0
    command = "--seed 0 --seconds 1 --model model --continue-from a.wav --continue-seconds 0.3 --melody a.wav\n"
    assert capsys.readouterr().out.endswith(f"musiclm generate 'slow piano' {command}")
    plain = write_musicgen(tmp_path / "plain")
    assert musiclm_command(*words[:2], "--model", plain, "--melody", tmp_path / "a.wav") == 2
    assert "no melody condition" in capsys.readouterr().err
    MusicGen.from_pretrained(plain).save_pretrained(tmp_path / "two", format="audiocraft")
    words = (*words[:2], "--model", tmp_path / "two", "--seconds", 0.1)
    assert musiclm_command(*words, "--out", tmp_path / "d.wav") == 0
