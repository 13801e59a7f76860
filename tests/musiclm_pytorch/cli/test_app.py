import itertools
import json
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
import yaml

import audiolm_pytorch
from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.training import tracking
from musiclm_pytorch.cli import generate as generate_command, train as train_command
from musiclm_pytorch.cli.commands import COMMANDS
from musiclm_pytorch.evaluation.plots import plot_wave
from tests.helpers.bad_input import bad_input, check_bad_input, listing
from tests.helpers.micro import write_clips

SHORT = ("--seconds", "0.5", "--num-samples", "2")
every_suffix = pytest.mark.parametrize(
    "suffix", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("wav", "ogg")), "flac", "mp3"]
)


@pytest.fixture
def model(micro_run):
    """A finished model; read only."""
    return micro_run / "model"


@pytest.fixture
def offline(monkeypatch):
    """Every attempt to open a socket fails."""

    def refuse(*arguments, **named):
        raise OSError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.slow
def test_generate_writes_music_without_network(musiclm_command, model, tmp_path, capsys, offline):
    """The music is written into a new folder, the similarity of every candidate is printed, and a plot is written."""
    out, plot = tmp_path / "new" / "folder" / "jig.wav", tmp_path / "pictures" / "jig.png"
    words = ("generate", "a low tone", "--model", model, "--seconds", "0.7", "--out", out, "--plot", plot)
    assert musiclm_command(*words, "--num-samples", 3, "--seed", 4) == 0
    wave, sample_hz = soundfile.read(out)
    assert sample_hz == 16000 and len(wave) == 0.7 * 16000
    assert 1e-3 < abs(wave).max() < 0.999
    printed = capsys.readouterr().out
    scores = {int(seed): float(score) for seed, score in re.findall(r"seed (\d) +similarity (-?\d\.\d+)", printed)}
    assert list(scores) == [4, 5, 6]
    kept = int(re.search(r"seed (\d).*<- kept", printed).group(1))
    assert scores[kept] == max(scores.values())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_generate_continues_a_file(musiclm_command, model, tmp_path, capsys):
    """A file of another sample rate is continued: its length counts towards --seconds, and it changes the result."""
    noise = torch.rand(4000, generator=torch.Generator().manual_seed(0)).numpy() - 0.5
    waves = {}
    for name, level in {"loud": 1.0, "soft": 0.01}.items():
        soundfile.write(tmp_path / f"{name}.wav", level * noise, 8000)
        words = ("generate", "a tone", "--model", model, "--seconds", "0.8", "--num-samples", 1)
        continuation = ("--continue-from", tmp_path / f"{name}.wav", "--out", tmp_path / f"{name}_on.wav")
        assert musiclm_command(*words, *continuation) == 0
        waves[name], sample_hz = soundfile.read(tmp_path / f"{name}_on.wav")
        assert len(waves[name]) == 0.8 * sample_hz
    assert abs(waves["loud"] - waves["soft"]).max() > 1e-3


def test_the_end_of_a_file_is_continued(musiclm_command, model, tmp_path):
    """--continue-seconds generates what the file with only these last seconds generates; by default, 5 s are added."""
    noise = torch.rand(8000, 2, generator=torch.Generator().manual_seed(0)).numpy() - 0.5
    soundfile.write(tmp_path / "song.wav", noise, 8000)
    soundfile.write(tmp_path / "end.wav", noise[-2000:], 8000)
    words = ("generate", "a tone", "--model", model, "--num-samples", 1)
    for name, end in {"song": ("--continue-seconds", 0.25), "end": ()}.items():
        out = ("--out", tmp_path / f"{name}_on.wav")
        assert musiclm_command(*words, "--continue-from", tmp_path / f"{name}.wav", *end, *out) == 0
    song, end = (soundfile.read(tmp_path / f"{name}_on.wav")[0] for name in ("song", "end"))
    assert len(song) == 5.26 * 16000 and (song == end).all()


def test_the_end_of_a_cut_mp3_is_continued(musiclm_command, model, tmp_path):
    """The last samples that can be decoded are continued, although the header contains a longer duration."""
    song = tmp_path / "song.mp3"
    soundfile.write(song, torch.rand(160_000, generator=torch.Generator().manual_seed(0)).numpy() - 0.5, 16000)
    song.write_bytes(song.read_bytes()[: song.stat().st_size // 2])
    wave, sample_hz = read_audio(song)
    assert wave.shape[1] < 0.6 * soundfile.info(song).frames
    soundfile.write(tmp_path / "end.wav", wave[0, -4000:].numpy(), sample_hz, subtype="FLOAT")
    words = ("generate", "a tone", "--model", model, "--num-samples", 1, "--seconds", 0.5)
    for file, end in {song: ("--continue-seconds", 0.25), tmp_path / "end.wav": ()}.items():
        out = ("--out", tmp_path / f"{file.stem}_on.wav")
        assert musiclm_command(*words, "--continue-from", file, *end, *out) == 0
    song_on, end_on = (soundfile.read(tmp_path / f"{name}_on.wav")[0] for name in ("song", "end"))
    assert (song_on == end_on).all()


@every_suffix
def test_the_seed_determines_the_music(musiclm_command, model, tmp_path, suffix):
    """The same command writes the same samples, another seed writes others, in every format."""
    for name, seed in {"a": 1, "b": 1, "c": 8}.items():
        out = tmp_path / f"{name}.{suffix}"
        assert musiclm_command("generate", "a tone", "--model", model, *SHORT, "--seed", seed, "--out", out) == 0
    a, b, c = (soundfile.read(tmp_path / f"{name}.{suffix}")[0] for name in "abc")
    assert (a == b).all() and (a != c).any()


@every_suffix
def test_a_file_knows_its_command(musiclm_command, model, tmp_path, monkeypatch, capsys, suffix):
    """The command of `musiclm info` generates the best of three candidates again, with all options."""
    monkeypatch.chdir(model.parent)
    text, out, again = 'un "ton" grave\n笛子', tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    options = ("--mix", 0.5, "a 'high' tone", "--negative", "noise", "--guidance-scale", 2, "--temperature", 0.9)
    words = ("generate", text, "--model", "model", "--seconds", 0.5, "--num-samples", 3, "--seed", 5, *options)
    assert musiclm_command(*words, "--out", out) == 0
    capsys.readouterr()
    assert musiclm_command("info", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["generated"]["text"] == text and 5 <= facts["generated"]["seed"] < 8
    program, *words = shlex.split(facts["command"])
    assert program == "musiclm" and words[words.index("--num-samples") + 1] == "1"
    assert musiclm_command(*words, "--out", again) == 0
    assert abs(soundfile.read(out)[0] - soundfile.read(again)[0]).max() < 1e-3


def test_the_command_of_a_file_has_its_recordings(musiclm_command, model, tmp_path, monkeypatch, capsys):
    """Story and recording are named, without the folders of absolute paths; from there, the command works."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    soundfile.write("a song.wav", torch.rand(8000, generator=torch.Generator().manual_seed(0)).numpy() - 0.5, 8000)
    Path("story.txt").write_text("0 a low tone\n0.4 a high tone\n")
    recording = ("--continue-from", tmp_path / "a song.wav", "--continue-seconds", 0.2)
    words = ("generate", "--story", "story.txt", "--model", tmp_path / "model", "--seconds", 0.6, "--seed", 3)
    assert musiclm_command(*words, *recording, "--num-samples", 1, "--out", "a.wav") == 0
    capsys.readouterr()
    assert musiclm_command("info", "a.wav") == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("command")).split(None, 1)[
        1
    ]
    assert command == (
        "musiclm generate --seed 3 --num-samples 1 --seconds 0.6 --model model --story story.txt "
        "--continue-from 'a song.wav' --continue-seconds 0.2"
    )
    assert musiclm_command(*shlex.split(command)[1:], "--out", "b.wav") == 0
    assert (soundfile.read("a.wav")[0] == soundfile.read("b.wav")[0]).all()
    assert musiclm_command("generate", "long " * 100, *words[3:7], "--num-samples", 1, "--out", "c.wav") == 0
    capsys.readouterr()
    assert musiclm_command("info", "c.wav") == 0
    assert "command" not in capsys.readouterr().out


@pytest.mark.parametrize("option", [(), ("--stream",)])
def test_progress_is_logged_without_a_terminal(musiclm_command, model, tmp_path, monkeypatch, caplog, option):
    """As in training; the time counts from the last line of any stage, since each of them may be short."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    monkeypatch.setattr(tracking.ProgressLog, "_logged", math.inf)
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    words = ("generate", "a tone", "--model", model, "--num-samples", 1, "--seconds", 15, "--out", tmp_path / "a.wav")
    assert musiclm_command(*words, *option) == 0
    lines = [message for message in caplog.messages if "min left" in message]
    names = {"music": "second"} if option else dict.fromkeys(("semantic", "coarse", "fine"), "frame")
    assert {line.partition(":")[0] for line in lines} == set(names)
    for line in lines:
        unit = names[line.partition(":")[0]]
        assert re.fullmatch(rf"\w+: {unit} \d+ of \d+, \d.* s per {unit}, \d+ min left", line)


@every_suffix
def test_writing_prints_nothing(tmp_path, capfd, suffix):
    """The decoder of MP3 files printed errors after a seek, though its samples were right."""
    noise = 0.3 * torch.randn(1, 600_000)  # nine blocks
    write_audio(tmp_path / f"a.{suffix}", noise, 16000)
    wave, _ = read_audio(tmp_path / f"a.{suffix}", channels=None)
    assert wave.shape == noise.shape and capfd.readouterr().err == ""


@pytest.mark.slow
def test_all_candidates_of_a_file_of_texts(musiclm_command, model, tmp_path, capsys):
    """--prompts, --keep-all and --json: every piece is the one of its text alone, and every candidate has its seed."""
    (tmp_path / "texts.txt").write_text("# a comment\na tone\n\na low tone\n")
    words = ("--model", model, *SHORT, "--seed", 3, "--temperature", 0.8, "--guidance-scale", 2)
    out = ("--out", tmp_path / "tune.wav", "--plot", tmp_path / "tune.png")
    assert musiclm_command("generate", "--prompts", tmp_path / "texts.txt", *words, *out, "--keep-all", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a tone", "a low tone"]
    names = {path.name for path in tmp_path.glob("tune*")}
    for number, row in enumerate(rows, start=1):
        scores = {candidate["seed"]: candidate["similarity"] for candidate in row["candidates"]}
        assert list(scores) == [3, 4] and scores[row["seed"]] == max(scores.values())
        assert (row["seconds"], row["sample_hz"], row["file"]) == (0.5, 16000, str(tmp_path / f"tune-{number}.wav"))
        names -= {f"tune-{number}.wav", f"tune-{number}.png", f"tune-{number}-seed{7 - row['seed']}.wav"}
    assert names == set()
    assert musiclm_command("generate", "a low tone", *words, "--out", tmp_path / "alone.wav") == 0
    alone, second = (soundfile.read(tmp_path / name)[0] for name in ("alone.wav", "tune-2.wav"))
    assert (alone == second).all()
    cold = ("--temperature", 0, "--out", tmp_path / "cold.wav")
    assert musiclm_command("generate", "a low tone", *words, *cold) == 0
    assert (soundfile.read(tmp_path / "cold.wav")[0] != alone).any()


def test_long_and_foreign_texts_are_accepted(musiclm_command, model, tmp_path, caplog):
    """10,000 characters are truncated with a warning, and every script is accepted, also in the comment of the file."""
    out = tmp_path / "a.wav"
    assert musiclm_command("generate", "a tone, " * 1250, "--model", model, *SHORT, "--out", out) == 0
    assert "truncated" in caplog.text and out.is_file()
    assert musiclm_command("generate", "une gigue à la flûte 笛子 🎶\n\0", "--model", model, *SHORT, "--out", out) == 0


@pytest.mark.slow
def test_any_text_is_a_title(tmp_path):
    """Formula signs, line breaks and invalid characters in a title are plain text."""
    for number, text in enumerate(("costs $\\q$ and $x", "two\nlines", "\ud800 broken", "long " * 500)):
        plot_wave(torch.randn(1600) * 0.1, 16000, tmp_path / f"{number}.png", title=text)
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


@pytest.mark.slow
def test_train_reports_every_step_and_continues(musiclm_command, micro_data, micro_run, tmp_path, capsys):
    """`train STEP`, then `train all`: one line per step with its time, no step runs twice, stderr is empty."""
    shutil.copytree(micro_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fine")
    shutil.rmtree(tmp_path / "run" / "model")
    words = ("--preset", "micro", "--data", micro_data, "--out", tmp_path / "run")
    assert musiclm_command("train", "fine", *words) == 0
    first = capsys.readouterr()
    assert re.search(r"^tokens .* done before\nfine +\d+\.\d s .*accuracy .*\ntotal ", first.out)
    assert "model in" in first.out
    assert musiclm_command("train", "all", *words) == 0
    second = capsys.readouterr()
    assert second.out.count("done before") == 8
    assert first.err == second.err == ""


@pytest.mark.slow
def test_scaled_training(musiclm_command, micro_data, tmp_path, capsys):
    """--scale shortens a run, and a folder belongs to one scale."""
    words = ("train", "codec", "--preset", "micro", "--data", micro_data, "--out", tmp_path / "run")
    assert musiclm_command(*words, "--scale", "0.05") == 0
    assert '"step": 10' in (tmp_path / "run" / "codec" / "finished.json").read_text()
    assert musiclm_command(*words) == 2
    assert "num_train_steps: found 10, expected 12" in capsys.readouterr().err


def test_plot_draws_runs_over_each_other(musiclm_command, micro_run, tmp_path, capsys):
    """One file per step with a line of each run, and the chance level dashed; of folders of trainers, one file."""
    other = tmp_path / "other"
    shutil.copytree(micro_run / "semantic", other / "semantic")
    assert musiclm_command("plot", micro_run, other, "--out", tmp_path / "plots") == 0
    steps = ("codec", "coarse", "fine", "mulan", "semantic", "semantic-tokenizer")
    assert set(capsys.readouterr().out.splitlines()) == {f"{tmp_path}/plots/{step}.svg" for step in steps}
    curve = (tmp_path / "plots" / "semantic.svg").read_text()
    assert all(f">{run} {phase} " in curve for run in (micro_run, other) for phase in ("semantic", "valid"))
    assert curve.count("stroke-dasharray") == 4
    words = ("plot", micro_run / "codec", "--out", tmp_path / "codec", "--metric")
    assert musiclm_command(*words, "mel") == 0 and (tmp_path / "codec" / "mel.svg").is_file()
    assert musiclm_command(*words, "mell") == 2
    assert re.search(r"no run has the metric 'mell'; choose one of: .*mel", capsys.readouterr().err)
    assert musiclm_command("plot", tmp_path / "codec", "--out", tmp_path / "none") == 2
    assert "contains no metrics.jsonl" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_settings_of_options_and_files(musiclm_command, micro_data, tmp_path, capsys):
    """Options override --config, which overrides the scaled preset; a folder belongs to its settings."""
    (tmp_path / "some.yaml").write_text("codec: {dim: 40, run: {batch_size: 3, num_train_steps: 11}}\n")
    words = ("train", "codec", "--preset", "micro", "--data", micro_data, "--out", tmp_path / "run", "--scale", "2")
    words += ("--config", tmp_path / "some.yaml", "--codec.run.batch-size", "2")
    assert musiclm_command(*words, "--print-config") == 0
    assert "num_workers" not in (printed := capsys.readouterr().out)
    (tmp_path / "all.yaml").write_text(printed)
    assert musiclm_command(*words, "--num-workers", "1") == 0
    preset = json.loads((tmp_path / "run" / "run.json").read_text())["preset"]
    assert preset["codec"]["dim"] == 40 and preset["semantic"]["run"]["num_train_steps"] == 24
    assert (preset["codec"]["run"]["batch_size"], preset["codec"]["run"]["num_train_steps"]) == (2, 11)
    capsys.readouterr()
    again = ("train", "codec", "--config", tmp_path / "all.yaml", *words[2:8])
    assert musiclm_command(*again) == 0
    assert "done before" in capsys.readouterr().out
    assert musiclm_command(*words, "--codec.run.batch-size=4") == 2
    assert "preset.codec.run.batch_size: found 2, expected 4" in capsys.readouterr().err


def test_settings_are_printed_without_a_folder(musiclm_command, tmp_path, capsys):
    """--print-config needs no --data and no --out; values of the file and of options are checked together."""
    (tmp_path / "some.yaml").write_text("semantic: {dim: 258}\n")
    words = ("--config", tmp_path / "some.yaml", "--semantic.heads", "6", "--print-config")
    assert musiclm_command("train", "all", "--preset", "tiny", *words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["semantic"]["heads"] == 6
    assert musiclm_command("train", "musicgen", "--dim", "66", "--heads", "6", "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["dim"] == 66


def test_steps_are_announced_on_a_terminal_only(monkeypatch, capsys):
    """The name of a step that starts is printed on a terminal, but not into a log file."""
    train_command._announce("codec")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train_command._announce("codec")
    assert capsys.readouterr().err == "codec ...\n"


@pytest.mark.slow
def test_train_with_bundled_parts(musiclm_command, micro_data, tmp_path, capsys, offline):
    """Bundled parts are not trained, and the run continues only with the same parts."""
    words = ("train", "tokens", "--preset", "micro", "--data", micro_data, "--out", tmp_path / "run")
    options = ("--codec", "codec_16khz", "--semantic-tokenizer", "semantic_16khz", "--mulan", "tiny", "--offline")
    assert musiclm_command(*words, *options, "--dry-run") == 0
    assert "tokens" in capsys.readouterr().out and listing(tmp_path) == {}
    assert musiclm_command(*words, *options) == 0
    printed = capsys.readouterr().out
    for stage, kind in (("semantic-tokenizer", "KMeansTokenizer"), ("codec", "SoundStream"), ("mulan", "MuLaN")):
        assert re.search(rf"^{stage} .*pretrained: {kind}$", printed, flags=re.MULTILINE)
    from audiolm_pytorch.codecs.base import Codec
    from audiolm_pytorch.data.shards import TokenShards

    assert (
        TokenShards(tmp_path / "run" / "tokens" / "train").fingerprint["codec"]
        == Codec.from_pretrained("codec_16khz").fingerprint()
    )
    assert musiclm_command(*words) == 2
    assert re.fullmatch(
        r"musiclm: .*run with other settings: pretrained.codec: found \w+, .*--allow-changed.*\n",
        capsys.readouterr().err,
    )


@pytest.mark.slow
def test_dry_run_measures_and_writes_nothing(musiclm_command, micro_data, tmp_path, capsys):
    """The table has parameters, tokens, disk space and time of every step."""
    before = listing(micro_data)
    words = ("train", "all", "--preset", "micro", "--data", micro_data, "--out", tmp_path / "run", "--dry-run")
    assert musiclm_command(*words) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(rows)[1:9] == [
        "codec",
        "semantic-tokenizer",
        "mulan",
        "quantizer",
        "tokens",
        "semantic",
        "coarse",
        "fine",
    ]
    # 12 steps of 4 crops of half a second, at 50 frames a second and 3 levels
    assert "3,600" in rows["codec"] and re.search(r"\d+ s$|\d\.\d s$", rows["codec"])
    assert "total" in rows
    assert listing(tmp_path) == {} and listing(micro_data) == before


def test_dry_run_skips_finished_steps(musiclm_command, micro_data, micro_run, capsys):
    """Finished steps need no time."""
    before = listing(micro_run)
    words = ("train", "all", "--preset", "micro", "--data", micro_data, "--out", micro_run, "--dry-run")
    assert musiclm_command(*words) == 0
    assert capsys.readouterr().out.count("  done\n") == 8
    assert listing(micro_run) == before


@pytest.mark.slow
def test_estimated_parameters_are_those_of_the_models(micro_data, micro_run, tmp_path):
    """The table of a dry run has the parameters of the modules that are trained."""
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.pipeline.estimate import estimate_steps
    from musiclm_pytorch.pipeline.pipeline import Pipeline
    from tests.helpers.micro import MICRO

    found = {one.step: one for one in estimate_steps(Pipeline(MICRO, data=micro_data, out=tmp_path / "run"))}
    audio_lm = MusicLM.from_pretrained(micro_run).audio_lm
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in (("codec", audio_lm.codec),)}
    assert found["codec"].num_parameters == count["codec"]


def test_export(musiclm_command, micro_run, tmp_path, capsys):
    """The exported folder is a complete model."""
    assert musiclm_command("export", "--run", micro_run, "--out", tmp_path / "shipped") == 0
    printed = re.search(r"wrote .*shipped, (\d+\.\d) MB", capsys.readouterr().out)
    num_bytes = sum(file.stat().st_size for file in (tmp_path / "shipped").rglob("*.*") if file.suffix != ".md")
    assert float(printed[1]) == round(num_bytes / 1e6, 1)
    assert musiclm_command("generate", "x", "--model", tmp_path / "shipped", *SHORT, "--out", tmp_path / "x.wav") == 0


# Words that are no command or no option, each with a pattern of the message.
BAD_ARGUMENTS = r"""
no command |  | a command is missing.*generate, .*train
unknown command | sing | no command musiclm sing; the commands are generate, .*train
misspelt command | generat x | no command musiclm generat; did you mean generate
misspelt second word | codec encod x | no command musiclm codec encod; did you mean encode
missing text | generate | the text is empty; describe the music
unquoted text | generate a slow waltz | not expected: slow, waltz; write a text of several words in quotation marks
misspelt option | generate x --secnds 3 | no option --secnds; use --seconds
output | generate x --output x.wav | no option --output; use --out;
duration | generate x --duration=3 | no option --duration=3; use --seconds;
short option | generate x -n 2 | no option -n; use --num-samples;
prompt | generate --prompt x | no option --prompt; write the text without an option
option of another command | generate x --layer 3 | no option --layer
no number | generate x --seconds abc | --seconds must be a number such as 2.5, got 'abc'
no whole number | generate x --seed 1.5 | --seed: .*'1.5'
no value | generate x --seed | Missing value for argument .*--seed
no weight | generate x --mix cello 0.5 | --mix: write the weight first.*e.g. --mix 0.5 .*; got 'cello', '0.5'
kmeans without options | train kmeans | missing: --encoder STR --layer INT --data PATH --out PATH; see .* kmeans --help
kmeans, unknown option | train kmeans --encoder E --layer 1 --data D --out O --preset x | has no option --preset
kmeans, no number | train kmeans --encoder E --layer x --data D --out O | --layer.*'x'
other name of a setting | train all --data D --output O | no setting --output; use --out
convert without a word | convert hubert | --checkpoint.*--out.*--kmeans
vq-wav2vec without options | convert vq-wav2vec | --checkpoint.*--out
no such choice | convert musiccaps --csv C --clips D --out O --split x | 'x'.*--split.*'none', 'eval', 'balanced'
no codec command | codec | a command is missing after musiclm codec; the commands are encode, decode, evaluate
unknown codec command | codec play TONE | no command musiclm codec play; the commands are encode, decode, evaluate
no codec input | codec encode --out TMP/a.safetensors | missing: INPUT
no codec output | codec encode TONE | missing: --out PATH
semantic without options | evaluate semantic | missing: --out PATH --encoder
"""


@bad_input(BAD_ARGUMENTS)
def test_arguments_that_cannot_be_parsed_are_explained(words, message, musiclm_command, capfd, tmp_path, monkeypatch):
    """One line on standard error names the argument and what to write, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    check_bad_input(musiclm_command, words, message, {"TMP": tmp_path}, capfd)


# Each with a pattern of the message. DATA, BARE, EMPTY, JUNK, MODEL, RUN and TMP are folders.
BAD_INPUT = r"""
no data folder | train all --data TMP/none --out TMP/out | TMP/none: no such folder
empty data folder | train all --data EMPTY --out TMP/out | EMPTY: the folder has no audio files
nothing readable | train codec --data JUNK --out TMP/out | JUNK: none of 1 audio files can be used.*noise.wav
no captions | train mulan --data BARE --out TMP/out | BARE has no captions.*pass a train.jsonl
no captions, all | train all --data BARE --out TMP/out | BARE has no captions.*pass a train.jsonl
no captions, dry | train mulan --data BARE --out TMP/out --dry-run | BARE has no captions
unknown preset | train all --preset tinny --data DATA --out TMP/out | 'tinny'; choose one of: tiny, small
unknown stage | train codek --data DATA --out TMP/out | 'codek'; pass all or one of: codec
misspelt setting | train all --semantic.run.learning-rat 1 --data DATA --out TMP/out | use --semantic.run.learning-rate$
other section | train all --coarse.run.learnig-rate 1 --data DATA --out TMP/out | use --coarse.run.learning-rate$
setting of no number | train all --semantic.dim=x --data DATA --out TMP/out | semantic.dim: .*must be int, got 'x'
setting without value | train all --data DATA --out TMP/out --semantic.dim | --semantic.dim needs a value
misspelt option | train all --dryrun --data DATA --out TMP/out | no setting --dryrun; use --dry-run
no config | train all --config TMP/none.yaml --data DATA --out TMP/out | cannot read TMP/none.yaml
scale | train all --scale nan --data DATA --out TMP/out | scale must be a number, got NaN
negative seed | train all --seed -1 --data DATA --out TMP/out | seed must not be negative, got -1
no data | train all --out TMP/out | --data is missing
no out | train all --data DATA | --out is missing
negative workers | train all --data DATA --out TMP/out --num-workers -1 | --num-workers must be at least 0
no layer | train all --data DATA --out TMP/out --semantic-tokenizer.layer 99 | layer must be from 1 to depth
levels | train all --data DATA --out TMP/out --preset tiny --num-coarse-quantizers 9 | below codec.num_quantizers=4
no codec | train all --data DATA --out TMP/out --codec tinny | tinny.*bundled model: codec_16khz
codec elsewhere | train all --data DATA --out TMP/out --codec a/b --offline | local cache .offline.* has no model a/b
no tokenizer | train all --data DATA --out TMP/out --semantic-tokenizer EMPTY | no complete SemanticTokenizer
codec as tokens | train all --data DATA --out TMP/out --semantic-tokenizer MODEL/codec |
    MODEL/codec holds a SoundStream, but a SemanticTokenizer is needed
no mulan | train all --data DATA --out TMP/out --mulan EMPTY | EMPTY contains no complete JointEmbedding
few levels | train all --preset small --data DATA --out TMP/out --codec MODEL/codec |
    the codec has \d levels, but the preset small needs 8; pass a codec with more
pretrained, another run | train all --preset micro --data DATA --out RUN --codec MODEL/codec |
    pretrained.codec: found none
missing stage | train fine --data DATA --out TMP/out | first run musiclm train semantic-tokenizer
out is a file | train codec --data DATA --out DATA/00.wav | 00.wav is a file
out in a file | train codec --preset micro --data DATA --out DATA/00.wav/run | 00.wav is a file
another run | train all --data DATA --out RUN | RUN contains a run with other settings.*--allow-changed
no run | plot --out TMP/plots | a run is missing; write musiclm plot
no model | generate x --model tiney --out TMP/x.wav |
    there is no folder tiney; pass .*bundled model: musicgen_tiny, tiny .did you mean tiny
run without model | generate x --model EMPTY --out TMP/x.wav | EMPTY contains no complete MusicLM
model in part | generate x --model MODEL --out TMP/x.wav | MODEL lacks coarse/model.safetensors; copy
text and story | generate x --story DATA/00.wav --out TMP/x.wav | got the text and --story; pass only one
no story | generate --story TMP/none.txt --out TMP/x.wav | TMP/none.txt: no such file
prompts and text | generate x --prompts JUNK/noise.wav --out TMP/x.wav | got the text and --prompts; pass only one
no prompts | generate --prompts TMP/none.txt --out TMP/x.wav | TMP/none.txt: no such file
prompts to standard output | generate --prompts LINES --stream --out - | --prompts writes several files
temperature below 0 | generate x --temperature -1 --out TMP/x.wav | --temperature must be from 0 to 10, got -1
temperature nan | generate x --temperature nan --out TMP/x.wav | --temperature must be from 0 to 10, got nan
guidance inf | generate x --guidance-scale inf --out TMP/x.wav | --guidance-scale must be from 0 to 100, got inf
all of a stream | generate x --keep-all --stream --out TMP/x.wav | --keep-all needs the whole music
json of a stream | generate x --json --stream --out TMP/x.wav | --json needs the whole music
story of noise | generate --story JUNK/noise.wav --out TMP/x.wav | noise.wav
empty text | generate '' --out TMP/x.wav | text is empty; describe the music
empty input | codec encode '' --out TMP/codes | value after encode is empty, perhaps from an unset variable
empty path | train all --data DATA --out '' | the value after --out is empty
empty value | train all --data= --out TMP/out | the value of --data is empty
negative seconds | generate x --seconds -1 --out TMP/x.wav | --seconds must be above 0 .*-1
seconds nan | generate x --seconds nan --out TMP/x.wav | --seconds must be above 0 .*nan
seconds inf | generate x --seconds inf --out TMP/x.wav | --seconds must be above 0 and at most 3600, got inf
no samples | generate x --num-samples 0 --out TMP/x.wav | --num-samples must be at least 1, got 0
huge scale | train all --scale 1e19 --data DATA --out TMP/out | scale must be positive and at most 1e.06
no dry-run device | train codec --dry-run-device nogpu --data DATA --out TMP/out | nogpu
huge seed | train kmeans --encoder x --layer 1 --seed 4294967296 --data DATA --out TMP/out | --seed must be below
prompt as output | generate x --continue-from DATA/00.wav --out DATA/00.wav | 00.wav is read, and would be overwritten
melody as output | generate x --melody DATA/00.wav --out DATA/00.wav | 00.wav is read, and would be overwritten
rank without stream | generate x --rank-seconds 2 --out TMP/x.wav | --rank-seconds needs --stream; add it, or leave
seed below 0 | generate x --seed -3 --out TMP/x.wav | --seed must be at least 0, got -3
nothing to continue | generate x --model NONE --continue-from TMP/none.wav --out TMP/x.wav |
    --continue-from: TMP/none.wav: no such file
no audio to continue | generate x --model NONE --continue-from JUNK/noise.wav --out TMP/x.wav |
    noise.wav: cannot be read as audio
longer than requested | generate x --model NONE --seconds 0.1 --continue-from DATA/00.wav --out TMP/x.wav |
    DATA/00.wav: .* longer than --seconds 0.1, .*; write --continue-seconds 0.05 .*, or --seconds
no melody | generate x --model NONE --melody TMP/none.wav --out TMP/x.wav | --melody: TMP/none.wav: no such file
melody is a folder | generate x --model NONE --melody EMPTY --out TMP/x.wav | --melody: EMPTY: is a folder
no melody in it | generate x --model NONE --melody JUNK/lines.txt --out TMP/x.wav | lines.txt: cannot be read as audio
nothing to mix | generate x --model NONE --mix 1 TMP/none.wav --out TMP/x.wav | TMP/none.wav: no such file
end of nothing | generate x --continue-seconds 2 --out TMP/x.wav | --continue-seconds needs --continue-from
no end | generate x --continue-from DATA/00.wav --continue-seconds 0 --out TMP/x.wav |
    --continue-seconds must be above 0, got 0
unknown suffix | generate x --out TMP/new/x.xyz | cannot write TMP/new/x.xyz: name a file that ends in .wav
no suffix | generate x --out TMP/new | cannot write TMP/new: name a file that ends in .wav
wave in a file | generate x --out DATA/00.wav/x.wav | 00.wav is a file
wave is a folder | generate x --out TMP/folder.wav | folder.wav: it is a folder
plot suffix | generate x --out TMP/new/x.wav --plot TMP/new/x.xyz | x.xyz: name a file that ends in .png
export of nothing | export --run EMPTY --out TMP/out | EMPTY contains no complete MusicLM
export over data | export --run RUN --out DATA | DATA contains files that do not belong to a model
"""


@pytest.fixture
def places(micro_run, micro_data, tmp_path):
    """Folders that bad input refers to."""
    found = {name: tmp_path / name.lower() for name in ("EMPTY", "JUNK", "MODEL", "TMP")}
    for name in ("EMPTY", "JUNK", "TMP"):
        found[name].mkdir()
    (found["JUNK"] / "noise.wav").write_bytes(b"\x00" * 50)
    (found["TMP"] / "folder.wav").mkdir()
    found["LINES"] = found["JUNK"] / "lines.txt"
    found["LINES"].write_text("a tone\n")
    shutil.copytree(micro_run / "model", found["MODEL"])
    (found["MODEL"] / "coarse" / "model.safetensors").unlink()
    found["BARE"] = write_clips(tmp_path / "bare", 3, captions=False)
    return {**found, "DATA": micro_data, "RUN": micro_run}


@pytest.mark.slow
@bad_input(BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(words, message, musiclm_command, places, capfd):
    """Every error has one line with the reason and what to do, and nothing is written."""
    check_bad_input(musiclm_command, words, message, places, capfd)


def test_missing_packages_are_named(musiclm_command, model, tmp_path, monkeypatch, capsys):
    """A missing package is reported before any work is done."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = tmp_path / "x.png"
    assert musiclm_command("generate", "x", "--model", model, "--out", tmp_path / "x.wav", "--plot", picture) == 2
    printed = capsys.readouterr().err
    assert 'pip install "musiclm[plot]"' in printed and printed.count("\n") == 1
    assert listing(tmp_path) == {}


def test_help_of_all_commands_is_short_and_quick(musiclm_command, capsys):
    """`musiclm --help` has at most 25 lines of at most 80 letters, and names every command."""
    assert musiclm_command("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 80
    for name in COMMANDS:
        assert any(line.split()[:1] == name.split()[:1] for line in lines)
    assert musiclm_command("codec", "--help") == 0
    assert "codec encode" in capsys.readouterr().out
    assert musiclm_command("--version") == 0
    assert capsys.readouterr().out == f"musiclm {audiolm_pytorch.__version__}\n"


def test_help_and_interruption(musiclm_command, monkeypatch, capsys):
    """Help exits with 0, Ctrl-C with 130 and one line."""
    assert musiclm_command("--help") == 0
    assert "generate" in capsys.readouterr().out
    assert musiclm_command("train", "--help") == 0
    printed = capsys.readouterr().out
    for option in ("--dry-run", "--codec", "--semantic-tokenizer", "--mulan", "--offline"):
        assert option in printed

    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command.Generate, "execute", interrupted)
    assert musiclm_command("generate", "x") == 130
    assert capsys.readouterr().err == "musiclm: interrupted\n"
    monkeypatch.setattr(train_command.Train, "execute", interrupted)
    assert musiclm_command("train", "all", "--data", "x", "--out", "y") == 130
    assert "same command again, and training continues" in capsys.readouterr().err


def test_words_that_cannot_be_printed(musiclm_command, tmp_path, capfd):
    """ESC in unknown options and commands is escaped, and texts must be UTF-8, before a model is loaded."""
    for words in (["generate", "x", "--bad\x1b[31m"], ["gen\x1b[31m"]):
        assert musiclm_command(*words) == 2
        error = capfd.readouterr().err
        assert r"\x1b[31m" in error and "\x1b[31m" not in error
    for words in (["caf\udce9"], ["x", "--negative", "caf\udce9"], ["x", "--mix", "1", "caf\udce9"]):
        assert musiclm_command("generate", *words, "--model", "none", "--out", tmp_path / "x.wav") == 2
        assert r"the text 'caf\udce9' is not UTF-8" in capfd.readouterr().err


def test_nan_samples_are_not_written(musiclm_command, model, tmp_path, monkeypatch, capsys):
    """Music with NaN samples is not written."""
    from musiclm_pytorch.musiclm import MusicLM

    generate = MusicLM._generate
    monkeypatch.setattr(MusicLM, "_generate", lambda *args, **named: generate(*args, **named) * torch.nan)
    assert musiclm_command("generate", "x", "--model", model, *SHORT, "--out", tmp_path / "x.wav") == 2
    assert "NaN" in capsys.readouterr().err
    assert listing(tmp_path) == {}


@pytest.mark.slow
def test_the_licence_of_a_model_is_printed_once_and_kept(musiclm_command, model, tmp_path, capsys, caplog):
    """A non-commercial model is exported only with consent, and its export is not commercial either."""
    run, out = shutil.copytree(model, tmp_path / "run"), tmp_path / "shipped"
    (run / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    words = ("export", "--run", run, "--out", out)
    assert musiclm_command(*words) == 2
    assert "forbids commercial use; pass" in capsys.readouterr().err and not out.exists()
    for _ in range(2):
        assert musiclm_command(*words, "--allow-noncommercial") == 0
    assert "\nlicense: cc-by-nc-4.0\n" in (out / "README.md").read_text()
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    assert musiclm_command("generate", "x", "--model", out, *SHORT, "--out", tmp_path / "x.wav") == 0
    licences = [message for message in caplog.messages if "licence of the weights" in message]
    assert licences == [
        f"{run}: licence of the weights cc-by-nc-4.0 (model card)",
        f"{out}: licence of the weights mit (model card)",
    ]


@pytest.mark.slow
def test_as_a_process(tmp_path):
    """A process ends with the exit status and one line on stderr; imports print no warnings."""
    program = "import sys; from musiclm_pytorch.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "generate", "x", "--model", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("musiclm: ") and ended.stderr.count("\n") == 1
