"""`musiclm generate --stream`: files and pipes that are written while the music is generated."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musiclm_pytorch.generation.prompts import Mixture
from musiclm_pytorch.generation.watermark import AudioSealWatermark
from musiclm_pytorch.musiclm import MusicLM
from tests.helpers.bad_input import bad_input, check_bad_input, listing

MICRO = Path(__file__).parents[2] / "helpers" / "micro.py"
WORDS = ("generate", "a low tone", "--seed", "4", "--num-samples", "2", "--rank-seconds", "0.2", "--stream")


@pytest.fixture
def model(micro_run):
    """A finished model; read only."""
    return micro_run / "model"


@pytest.mark.slow
def test_a_stream_equals_the_music_of_its_seed(musiclm_command, model, tmp_path, capsys):
    """The file has a right header, and the samples of the selected candidate, except for the scale of its peak."""
    out = tmp_path / "new" / "stream.wav"
    assert musiclm_command(*WORDS, "--model", model, "--seconds", 0.9, "--out", out) == 0
    printed = capsys.readouterr()
    seed = next(line.split()[3] for line in printed.out.splitlines() if line.endswith("<- kept"))
    assert printed.out.count("candidate ") == 2 and printed.out.endswith(f"wrote {out}\n") and printed.err == ""
    data = out.read_bytes()
    assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
    assert struct.unpack_from("<I", data, 40)[0] == len(data) - 44 == 2 * 0.9 * 16000
    wave, sample_hz = soundfile.read(out)
    assert sample_hz == 16000 and len(wave) == 0.9 * 16000
    words = ("generate", "a low tone", "--model", model, "--seconds", 0.9, "--num-samples", 1, "--seed", seed)
    assert musiclm_command(*words, "--out", tmp_path / "offline.wav") == 0
    offline, _ = soundfile.read(tmp_path / "offline.wav")
    scale = min(1.0, abs(offline).max() / abs(wave).max())
    assert abs(wave * scale - offline).max() < 1e-3
    for name, option in (("x.raw", ()), ("y.wav", ("--raw",))):
        assert musiclm_command(*WORDS, "--model", model, "--seconds", 0.9, "--out", tmp_path / name, *option) == 0
        assert (tmp_path / name).read_bytes() == data[44:]


@pytest.mark.parametrize("option", [(), ("--stream",)])
def test_a_terminal_shows_the_progress_with_the_time_left(
    musiclm_command, model, tmp_path, monkeypatch, capsys, option
):
    """A bar with elapsed and remaining time; without a terminal, standard error stays empty."""
    words = ("generate", "a tone", "--model", model, "--seconds", 0.5, "--num-samples", 1, "--out", tmp_path / "a.wav")
    assert musiclm_command(*words, *option) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert musiclm_command(*words, *option) == 0
    assert re.search(r"\d+%.*\d\d:\d\d<", capsys.readouterr().err)


def test_the_file_grows_while_music_is_generated(musiclm_command, model, tmp_path, monkeypatch):
    """Every chunk is in the file before the next one is generated; until then the header has an unknown length."""
    out, sizes, stream = tmp_path / "music.wav", [], MusicLM.stream

    def watched(self, *arguments, **options):
        for chunk in stream(self, *arguments, **options):
            yield chunk
            sizes.append(out.stat().st_size)
            assert struct.unpack_from("<I", out.read_bytes(), 40)[0] == 0xFFFFFFFF

    monkeypatch.setattr(MusicLM, "stream", watched)
    assert musiclm_command(*WORDS, "--model", model, "--seconds", 3.2, "--out", out) == 0
    assert len(sizes) >= 3 and sizes == sorted(set(sizes)) and sizes[-1] == out.stat().st_size


def run_piped(model: Path, *options: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(MICRO.parents[2])}
    words = [sys.executable, str(MICRO), *WORDS, "--model", str(model), "--seconds", "5", "--out", "-", *options]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_reader_of_the_pipe_receives_samples_before_the_end(model):
    """Standard output has only samples, messages go to standard error. 5 s fill the pipe more than twice."""
    process = run_piped(model)
    header = process.stdout.read(44)
    part = process.stdout.read(16000)
    assert process.poll() is None
    assert header[:4] == b"RIFF" and struct.unpack_from("<I", header, 40)[0] == 0xFFFFFFFF
    rest = process.stdout.read()
    messages = process.stderr.read().decode()
    assert process.wait() == 0 and "<- kept" in messages and messages.endswith("wrote standard output\n")
    samples = np.frombuffer(part + rest, dtype="<i2")
    assert len(samples) == 5 * 16000 and abs(samples).max() > 30
    raw = run_piped(model, "--raw")
    assert raw.communicate()[0] == part + rest


@pytest.mark.slow
def test_a_reader_that_stops_ends_the_command(model):
    """As a player that is closed: the exit status of a broken pipe, and no message."""
    process = run_piped(model)
    process.stdout.read(1000)
    process.stdout.close()
    messages = process.stderr.read().decode()
    assert process.wait() == 141 and "ipe" not in messages and "Traceback" not in messages


def test_a_stream_with_nan_samples_is_an_error(musiclm_command, model, tmp_path, monkeypatch, capsys):
    """The message names the model."""
    stream = MusicLM.stream

    def broken(self, *arguments, **options):
        for chunk in stream(self, *arguments, **options):
            chunk.waves[0][3] = float("nan")
            yield chunk

    monkeypatch.setattr(MusicLM, "stream", broken)
    assert musiclm_command(*WORDS, "--model", model, "--seconds", 0.5, "--out", tmp_path / "x.wav") == 2
    assert "generated NaN samples" in capsys.readouterr().err


@pytest.mark.slow
def test_the_watermark_is_in_the_music_and_in_every_chunk(musiclm_command, model, tmp_path, monkeypatch):
    """It is loaded with the options of other models, from a folder or a hub id with a revision."""
    sources = []

    def fake(cls, source, **options):
        sources.append((source, options["revision"], options["offline"]))
        return lambda wave, sample_hz: 0 * wave + sample_hz / 64_000

    monkeypatch.setattr(AudioSealWatermark, "from_pretrained", classmethod(fake))
    for name, words in (("offline.wav", WORDS[:6]), ("stream.wav", WORDS)):
        words = (*words, "--model", model, "--seconds", 1.3, "--out", tmp_path / name, "--watermark", "me/marks@v1")
        assert musiclm_command(*words, "--offline") == 0
        wave, _ = soundfile.read(tmp_path / name)
        assert len(wave) == 1.3 * 16000 and (abs(wave - 0.25) < 1e-3).all()
    assert sources == [("me/marks", "v1", True)] * 2


BAD_INPUT = r"""
suffix | generate x --stream --out TMP/x.flac | name a file that ends in .wav, .raw
plot | generate x --stream --out TMP/x.wav --plot TMP/x.png | --plot needs the whole music
pipe without stream | generate x --out - | --out - needs --stream
raw without stream | generate x --raw --out TMP/x.wav | --raw needs --stream
rank seconds | generate x --stream --rank-seconds 0 --out TMP/x.wav | --rank-seconds must be above 0, got 0
rank nan | generate x --stream --rank-seconds nan --out TMP/x.wav | --rank-seconds must be above 0, got nan
longer | generate x --model RUN/model --stream --seconds 0.1 --continue-from DATA/00.wav --out TMP/x.wav | longer than
"""


@bad_input(BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    words, message, musiclm_command, micro_run, micro_data, tmp_path, capfd
):
    """Every error has one line with the reason and what to do, and nothing is written."""
    (tmp_path / "tmp").mkdir()
    places = {"TMP": tmp_path / "tmp", "RUN": micro_run, "DATA": micro_data}
    check_bad_input(musiclm_command, words, message, places, capfd)
    assert listing(tmp_path / "tmp") == {}


def test_a_named_pipe_gets_a_header_of_unknown_length(musiclm_command, model, tmp_path):
    """The header of a pipe cannot be changed at the end."""
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        assert musiclm_command(*WORDS, "--model", model, "--seconds", 0.5, "--out", pipe) == 0
        data = reader.communicate()[0]
    assert len(data) == 44 + 2 * 0.5 * 16000 and struct.unpack_from("<I", data, 40)[0] == 0xFFFFFFFF


def test_samples_are_not_written_to_a_closed_output(musiclm_command, monkeypatch, capsys):
    """A program that is started without standard output has None there."""
    monkeypatch.setattr(sys, "stdout", None)
    assert musiclm_command("generate", "x", "--stream", "--out", "-") == 2
    assert "standard output is a terminal or closed" in capsys.readouterr().err


def test_samples_are_not_written_to_a_terminal(musiclm_command, monkeypatch, capsys):
    """A terminal would show them as text."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert musiclm_command("generate", "x", "--stream", "--out", "-") == 2
    assert "standard output is a terminal" in capsys.readouterr().err


@pytest.mark.slow
def test_a_story_with_a_mixture_and_a_negative_text(musiclm_command, micro_run, tmp_path, capsys):
    """The file has the samples of the Python call, also in a stream; by default it ends 5 s after the last start."""
    (tmp_path / "story.txt").write_text("# two parts\n0 a low tone\n\n0.25 a high tone\n")
    words = ("generate", "--story", tmp_path / "story.txt", "--mix", "0.5", "a middle tone", "--negative", "noise")
    options = ("--model", micro_run / "model", "--seed", 4, "--num-samples", 1, "--guidance-scale", 2)
    assert musiclm_command(*words, *options, "--seconds", 0.5, "--out", tmp_path / "story.wav") == 0
    mixtures = [Mixture([(text, 1.0), ("a middle tone", 0.5)]) for text in ("a low tone", "a high tone")]
    musiclm = MusicLM.from_pretrained(micro_run)
    story, request = [*zip((0.0, 0.25), mixtures)], {"num_samples": 1, "seconds": 0.5, "seed": 4}
    request["sampling"] = {stage: {"guidance_scale": 2.0} for stage in ("semantic", "coarse")}
    expected = musiclm(story, negative_text="noise", **request)[0]
    wave, _ = soundfile.read(tmp_path / "story.wav")
    assert abs(wave - expected.numpy()).max() < 1e-3
    assert musiclm_command(*words, *options, "--seconds", 0.5, "--stream", "--out", tmp_path / "stream.wav") == 0
    stream, _ = soundfile.read(tmp_path / "stream.wav")
    assert abs(stream * min(1.0, abs(wave).max() / abs(stream).max()) - wave).max() < 1e-3
    assert musiclm_command(*words, *options, "--out", tmp_path / "default.wav") == 0
    assert soundfile.info(tmp_path / "default.wav").duration == 5.26
    capsys.readouterr()
    for line, problem in (("x y", "must be like"), ("3", "has no text"), ("", "has no lines")):
        (tmp_path / "story.txt").write_text(line)
        assert musiclm_command(*words, *options, "--out", tmp_path / "x.wav") == 2
        assert problem in capsys.readouterr().err
