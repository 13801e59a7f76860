import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.codecs.code_file import read_codes
from audiolm_pytorch.codecs.transcode import FileCodec
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.modules import load_module, save_module
from tests.helpers.bad_input import bad_input, check_bad_input, listing
from tests.helpers.full_disk import full_disk


def saved_codec(folder, seed=0):
    """A tiny codec at 8 kHz with random weights, on disk."""
    torch.manual_seed(seed)
    sizes = dict(channels=2, codebook_dim=8, codebook_size=16, rq_num_quantizers=3, strides=(2, 5))
    save_module(SoundStream(**sizes, target_sample_hz=8000), folder)
    return folder


@pytest.fixture
def codec(tmp_path_factory):
    """The folder of a codec."""
    return saved_codec(tmp_path_factory.mktemp("codec") / "codec")


@pytest.fixture
def sounds(write_tone, tmp_path):
    """A folder of three sounds of different rates, channels and lengths, and of one file that is none."""
    write_tone("sounds/a.wav", 0.5, 44100, channels=2)
    write_tone("sounds/album/b.flac", 0.3, 16000)
    write_tone("sounds/album/c.ogg", 0.2, 8000)
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"\x00" * 50)
    (tmp_path / "sounds" / ".hidden.wav").write_bytes(b"\x00" * 50)
    (tmp_path / "sounds" / "notes.txt").write_text("no sound")
    return tmp_path / "sounds"


def test_encode_and_decode_a_file(musiclm_command, codec, write_tone, tmp_path, capsys):
    """The codes are those of the codec on the whole file; the decoded sound has the original length, at either rate."""
    source = write_tone("tone.wav", 0.7, 44100, channels=2)
    codes, back = tmp_path / "new" / "tone.safetensors", tmp_path / "other" / "tone.flac"
    assert musiclm_command("codec", "encode", source, "--out", codes, "--codec", codec) == 0
    said = capsys.readouterr()
    assert (
        re.search(
            r"tone.safetensors  0.70 s, 560 frames of 3 levels, 9.60 kbps of codes, [0-9.]+ kbps as a file\n$", said.out
        )
        and not said.err
    )
    file_kbps = 8 * codes.stat().st_size / 0.7 / 1000
    assert f" {file_kbps:.2f} kbps as a file" in said.out
    wave = read_audio(source, 8000)[0]
    module = load_module(codec)
    assert torch.equal(read_codes(codes).codes, module.tokenize(wave)[0])
    assert musiclm_command("codec", "decode", codes, "--out", back, "--codec", codec) == 0
    got, rate = soundfile.read(back, dtype="float32")
    wanted = module.decode_from_codebook_indices(read_codes(codes).codes[None], num_samples=5600)[0, 0].clamp(-1, 1)
    assert rate == 8000 and len(got) == 5600 and np.abs(got - wanted.detach().numpy()).max() < 1 / 16000
    words = ("codec", "decode", codes, "--out", back, "--codec", codec, "--original-rate", "--levels", 1)
    assert musiclm_command(*words) == 0
    assert (soundfile.info(back).frames, soundfile.info(back).samplerate) == (30870, 44100)
    assert set(listing(tmp_path)) == {"tone.wav", "new", "new/tone.safetensors", "other", "other/tone.flac"}


def test_folders_keep_their_tree_and_failed_files_are_named(musiclm_command, codec, sounds, tmp_path, capsys):
    """Readable files are converted, others are named with the reason, and the exit status is 2."""
    codes, back = tmp_path / "codes", tmp_path / "back"
    assert musiclm_command("codec", "encode", sounds, "--out", codes, "--codec", codec, "--levels", 2) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"musiclm: .*broken.wav: cannot be read as audio .*\n", said.err)
    assert "3 of 4 files done" in said.out
    assert set(listing(codes)) == {"a.safetensors", "album", "album/b.safetensors", "album/c.safetensors"}
    assert read_codes(codes / "a.safetensors").codes.shape == (400, 2)
    words = ("codec", "decode", codes, "--out", back, "--codec", codec)
    assert musiclm_command(*words, "--suffix", ".ogg") == 0
    assert set(listing(back)) == {"a.ogg", "album", "album/b.ogg", "album/c.ogg"}
    assert [soundfile.info(back / name).frames for name in ("a.ogg", "album/b.ogg")] == [4000, 2400]
    assert "3 of 3 files done" in capsys.readouterr().out


def test_two_sounds_of_one_name_do_not_overwrite_each_other(musiclm_command, codec, write_tone, tmp_path, capsys):
    """song.flac, song.wav and SONG.mp3 keep their whole names; a file with another name does not."""
    for seconds, name in enumerate(("song.flac", "song.wav", "SONG.mp3", "other.wav", "sub/song.wav"), 1):
        write_tone(f"sounds/{name}", 0.1 * seconds, 8000)
    words = ("codec", "encode", tmp_path / "sounds", "--out", tmp_path / "o", "--codec", codec)
    assert musiclm_command(*words) == 0
    assert "5 of 5 files done" in capsys.readouterr().out
    names = ["SONG.mp3", "other", "song.flac", "song.wav", "sub/song"]
    assert set(listing(tmp_path / "o")) == {"sub", *(f"{name}.safetensors" for name in names)}
    assert read_codes(tmp_path / "o" / "song.wav.safetensors").info.num_samples == 1600
    assert musiclm_command("codec", "decode", tmp_path / "o", "--out", tmp_path / "back", "--codec", codec) == 0
    assert set(listing(tmp_path / "back")) == {"sub", *(f"{name}.wav" for name in names)}


def test_sounds_that_cannot_be_decoded_are_named(musiclm_command, codec, write_tone, tmp_path, capsys):
    """One list of formats serves training and `codec encode`: .caf and .oga are read, .m4a and links are named."""
    folder = tmp_path / "sounds"
    write_tone("sounds/a.wav", 0.1, 8000)
    shutil.copy(folder / "a.wav", folder / "b.aiff")
    write_tone("elsewhere/c.wav", 0.1, 8000)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "d.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    words = ("codec", "encode", folder, "--out", tmp_path / "o", "--codec", codec)
    assert musiclm_command(*words) == 0
    printed = capsys.readouterr()
    assert "3 of 3 files done" in printed.out
    assert re.search(r"left out \S+d.m4a: .m4a cannot be decoded; convert it", printed.err)
    assert re.search(r"left out \S+gone.wav: the link points to a missing file", printed.err)
    assert printed.err.count("\n") == 2


@pytest.mark.parametrize("levels", [None, 2])
def test_printed_bitrates_are_those_of_codes_and_file(musiclm_command, codec, write_tone, tmp_path, capsys, levels):
    """The rate of the codes without coding, and the rate of the bytes that were written, are both printed."""
    sound, out = write_tone("a.wav", 2.0, 8000), tmp_path / "a.safetensors"
    more = () if levels is None else ("--levels", levels)
    assert musiclm_command("codec", "encode", sound, "--out", out, "--codec", codec, *more) == 0
    codes, file = re.search(r"([\d.]+) kbps of codes, ([\d.]+) kbps as a file", capsys.readouterr().out).groups()
    stored = read_codes(out)
    assert float(codes) == pytest.approx(stored.kbps, abs=0.005)
    assert float(file) == pytest.approx(8 * out.stat().st_size / 2.0 / 1000, abs=0.005)


def test_entropy_coding(musiclm_command, codec, write_tone, tmp_path, capsys):
    """The decoded sound is that of the raw codes; the printed rate is that of the written tensors."""
    sound, folder, raw = write_tone("a.wav", 0.4, 8000), tmp_path / "entropy", tmp_path / "raw.safetensors"
    coded = tmp_path / "coded.safetensors"
    sizes = dict(codebook_size=16, num_quantizers=3, rate_hz=800, dim=16, depth=1, heads=2)
    fingerprints = {"acoustic": load_module(codec).fingerprint()}
    save_module(EntropyTransformer(**sizes, token_fingerprints=fingerprints), folder)
    encode, decode = ("codec", "encode", sound, "--codec", codec), ("codec", "decode", "--codec", codec)
    assert musiclm_command(*encode, "--out", raw, "--levels", 2) == 0
    assert musiclm_command(*encode, "--out", coded, "--levels", 2, "--entropy", folder) == 0
    kbps = re.search(r"6.40 kbps of codes, ([\d.]+) kbps entropy-coded, ", capsys.readouterr().out)[1]
    with safe_open(coded, framework="pt") as opened:
        num_bytes = sum(opened.get_tensor(name).nbytes for name in opened.keys())
    assert float(kbps) == pytest.approx(8 * num_bytes / 0.4 / 1000, abs=0.005)
    for codes, options in ((raw, ()), (coded, ("--entropy", folder))):
        assert musiclm_command(*decode, codes, "--out", codes.with_suffix(".wav"), *options) == 0
    assert raw.with_suffix(".wav").read_bytes() == coded.with_suffix(".wav").read_bytes()
    assert musiclm_command(*decode, coded, "--out", tmp_path / "b.wav") == 2
    assert re.fullmatch(r"musiclm: .*compressed by the entropy model .*--entropy.*\n", capsys.readouterr().err)
    assert musiclm_command(*decode, raw, "--out", tmp_path / "b.wav", "--entropy", folder) == 2
    assert "raw.safetensors: the codes are not compressed; leave out" in capsys.readouterr().err
    other = saved_codec(tmp_path / "other", seed=1)
    assert musiclm_command(*encode[:3], "--codec", other, "--out", raw, "--entropy", folder) == 2
    assert "different fingerprints" in capsys.readouterr().err


def test_evaluate_prints_a_table_and_writes_json(musiclm_command, codec, sounds, tmp_path, capsys):
    """One row per number of levels; unreadable files are named."""
    words = ("codec", "evaluate", sounds, "--codec", codec, "--levels", 1, 2)
    assert musiclm_command(*words, "--json", tmp_path / "new" / "figures.json", "--seconds", "0.25") == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"musiclm: .*broken.wav: cannot be read as audio .*\n", said.err)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in said.out.splitlines()[3:-1]}
    names = [str(codec) + levels for levels in (", 3 levels", ", 1 level", ", 2 levels")]
    assert list(rows) == names
    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert written["settings"]["num_files"] == 3 and written["settings"]["codec_class"] == "SoundStream"
    by_name = {row["name"]: row for row in written["rows"]}
    assert by_name[names[0]]["kbps"] == pytest.approx(9.6)
    assert len(by_name[names[2]]["usage"]) == 2
    # 0.25 s of the longer two and 0.2 s of the shortest
    assert by_name[names[0]]["seconds"] == pytest.approx(0.7)


def test_the_bundled_codec_is_the_default(musiclm_command, write_tone, tmp_path, monkeypatch, codec):
    """--codec defaults to the bundled codec."""
    monkeypatch.setattr("audiolm_pytorch.saving.sources.bundled_models", lambda: {"codec_16khz": codec})
    source = write_tone("tone.wav", 0.1, 8000)
    assert musiclm_command("codec", "encode", source, "--out", tmp_path / "a.safetensors") == 0
    assert read_codes(tmp_path / "a.safetensors").info.codec_fingerprint == load_module(codec).fingerprint()


# Each with words of the message. TONE, CODES and JUNK are files, FOLDER and EMPTY folders, CODEC and OTHER codecs.
BAD_INPUT = r"""
missing input | encode TMP/none --out TMP/a.safetensors | TMP/none: no such file or folder
no sound | encode JUNK --out TMP/a.safetensors --codec CODEC | junk.wav: cannot be read as audio
empty folder | encode EMPTY --out TMP/out --codec CODEC | empty: contains no .wav
wrong suffix | encode TONE --out TMP/a.wav --codec CODEC | a.wav: name a file that ends in .safetensors
out is a folder | encode TONE --out TMP/x.safetensors | x.safetensors: it is a folder
out in a file | encode TONE --out TONE/a.safetensors | tone.wav is a file; name another folder
folder in a file | encode FOLDER --out TONE | tone.wav is a file; name another folder
no codec | encode TONE --out TMP/a.safetensors --codec tinny | tinny.*bundled model: codec_16khz
no codec in folder | encode TONE --out TMP/a.safetensors --codec EMPTY | empty.*config.json
no such levels | encode TONE --out TMP/a.safetensors --codec CODEC --levels 4 | tone.wav: .* 1..3, got 4
device | encode TONE --out TMP/a.safetensors --codec CODEC --device tpu9 | the device tpu9 cannot be used
no entropy model | encode TONE --out TMP/a.safetensors --codec CODEC --entropy CODEC |
    holds a SoundStream, but a EntropyTransformer is needed
no codes | decode TONE --out TMP/a.wav --codec CODEC | tone.wav is not a readable safetensors file
weights | decode CODEC/model.safetensors --out TMP/a.wav --codec CODEC | is not a file of codes
codes of another | decode CODES --out TMP/a.wav --codec OTHER |
    are from the codec SoundStream .*decode with the codec that encoded the sound
decode suffix | decode CODES --out TMP/a.m4a --codec CODEC | a.m4a: name a file that ends in .wav, .flac
folder suffix | decode FOLDER --out TMP/out --suffix mp3 | --suffix must be one of .wav, .flac, .ogg
decode in place | decode FOLDER --out FOLDER --codec CODEC | is the input folder, .*use another --out
evaluate levels | evaluate TONE --codec CODEC --levels 9 | 1..3, got 9
evaluate json | evaluate TONE --codec CODEC --json TMP/a.txt | a.txt: name a file that ends in .json
evaluate seconds | evaluate TONE --codec CODEC --seconds 0 | --seconds must be above 0 and finite, got 0
evaluate endless | evaluate TONE --codec CODEC --seconds inf | --seconds must be above 0 and finite, got inf
evaluate junk | evaluate JUNK --codec CODEC | junk.wav: cannot be read as audio
"""


@pytest.fixture(scope="module")
def other_codec(tmp_path_factory):
    """The folder of another codec; read only."""
    return saved_codec(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def places(codec, other_codec, write_tone, tmp_path, musiclm_command):
    """What bad input speaks of."""
    found = {"CODEC": codec, "OTHER": other_codec, "TMP": tmp_path}
    found["TONE"] = write_tone("folder/tone.wav", 0.1, 8000)
    found["FOLDER"], found["CODES"] = tmp_path / "folder", tmp_path / "folder" / "codes.safetensors"
    assert musiclm_command("codec", "encode", found["TONE"], "--out", found["CODES"], "--codec", codec) == 0
    found["EMPTY"], found["JUNK"] = tmp_path / "empty", tmp_path / "junk.wav"
    found["EMPTY"].mkdir()
    (tmp_path / "x.safetensors").mkdir()
    found["JUNK"].write_bytes(b"\x00" * 50)
    return found


@bad_input(BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(words, message, musiclm_command, places, capfd):
    """Every error has one line with the cause and the fix, and nothing is written."""
    check_bad_input(musiclm_command, ["codec", *words], message, places, capfd)


def test_a_failure_keeps_the_old_file(musiclm_command, codec, write_tone, tmp_path, monkeypatch, capsys):
    """A sound whose second half cannot be decoded does not replace the existing file."""
    codes, out = tmp_path / "a.safetensors", tmp_path / "a.wav"
    musiclm_command("codec", "encode", write_tone("tone.wav", 1.0, 8000), "--out", codes, "--codec", codec)
    assert musiclm_command("codec", "decode", codes, "--out", out, "--codec", codec) == 0
    old = out.read_bytes()
    pieces = [torch.zeros(1, 4000), torch.full((1, 4000), torch.nan)]
    monkeypatch.setattr(FileCodec, "_decoded", lambda *arguments: iter(pieces))
    before = listing(tmp_path)
    assert musiclm_command("codec", "decode", codes, "--out", out, "--codec", codec) == 2
    assert "NaN" in capsys.readouterr().err
    assert out.read_bytes() == old and listing(tmp_path) == before


def test_the_suffix_of_a_single_file_is_that_of_its_name(musiclm_command, codec, write_tone, tmp_path, capsys):
    """An option that contradicts the name of the output is an error, not ignored."""
    codes = tmp_path / "a.safetensors"
    assert musiclm_command("codec", "encode", write_tone("a.wav"), "--out", codes, "--codec", codec) == 0
    words = ("codec", "decode", codes, "--codec", codec, "--suffix", ".flac", "--out")
    assert musiclm_command(*words, tmp_path / "b.wav") == 2
    assert "--suffix .flac is for a folder of files" in capsys.readouterr().err and not (tmp_path / "b.wav").exists()
    assert musiclm_command(*words, tmp_path / "b.flac") == 0


def test_printed_paths_have_no_control_characters(musiclm_command, codec, write_tone, tmp_path, capsys):
    """A file name cannot change the colour of the terminal or imitate another line."""
    folder = write_tone("in/a\x1b[31m\nwrote b.wav").parent
    (folder / "c\x1b.wav").write_text("no sound")
    words = ("--codec", codec, "--out")
    assert musiclm_command("codec", "encode", folder, *words, tmp_path / "c\nodes") == 2
    assert musiclm_command("codec", "decode", tmp_path / "c\nodes", *words, tmp_path / "back") == 0
    report = tmp_path / "x\x1b.json"
    assert musiclm_command("codec", "evaluate", folder, "--codec", codec, "--json", report) == 2
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and r"a\x1b[31m\nwrote b" in printed and r"wrote " in printed


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_disk_without_a_free_byte_is_one_line(musiclm_command, codec, write_tone, tmp_path, capsys, suffix):
    """Every format reports the disk, and the older file stays."""
    codes, out = tmp_path / "a.safetensors", tmp_path / f"b{suffix}"
    assert musiclm_command("codec", "encode", write_tone("a.wav"), "--out", codes, "--codec", codec) == 0
    assert musiclm_command("codec", "decode", codes, "--codec", codec, "--out", out) == 0
    before = listing(tmp_path), out.read_bytes()
    for num_bytes in (0, 20):
        capsys.readouterr()
        with full_disk(num_bytes):
            assert musiclm_command("codec", "decode", codes, "--codec", codec, "--out", out) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "the file cannot be written" in errors and "Hz" not in errors
        assert (listing(tmp_path), out.read_bytes()) == before


def test_files_of_the_user_are_not_overwritten(musiclm_command, codec, write_tone, tmp_path, capsys):
    """Codes replace codes and decoded sounds replace decoded sounds, but no other file, alone or in a folder."""
    song, weights, codes = write_tone("songs/a.wav"), tmp_path / "models" / "a.safetensors", tmp_path / "codes"
    weights.parent.mkdir()
    save_file({"mine": torch.ones(3)}, weights)
    before = song.read_bytes(), weights.read_bytes()
    coding, decoding = ("codec", "encode", "--codec", codec), ("codec", "decode", "--codec", codec)
    assert musiclm_command(*coding, song.parent, "--out", codes) == 0
    for words in (
        (*coding, song, "--out", weights),
        (*coding, song.parent, "--out", weights.parent),
        (*decoding, codes / "a.safetensors", "--out", song),
        (*decoding, codes, "--out", song.parent),
    ):
        assert musiclm_command(*words) == 2
        assert "exists, and was not written by this library" in capsys.readouterr().err
    assert (song.read_bytes(), weights.read_bytes()) == before
    (tmp_path / "mine.json").write_text('{"format_version": 1}')
    assert musiclm_command("codec", "evaluate", song, "--codec", codec, "--json", tmp_path / "mine.json") == 2
    assert "mine.json exists, and was not written by this library" in capsys.readouterr().err
    for suffix in (".wav", ".flac", ".ogg"):
        for _ in range(2):
            assert musiclm_command(*coding, song.parent, "--out", codes) == 0
            assert musiclm_command(*decoding, codes, "--out", tmp_path / "back", "--suffix", suffix) == 0


def test_codes_in_links_are_decoded_and_lost_links_named(musiclm_command, codec, write_tone, tmp_path, capsys):
    """A folder of codes is searched as a folder of sounds is."""
    codes = tmp_path / "codes"
    write_tone("songs/a.wav", 0.1)
    for folder in (codes, tmp_path / "far"):
        assert musiclm_command("codec", "encode", tmp_path / "songs", "--out", folder, "--codec", codec) == 0
    (codes / "sub").symlink_to(tmp_path / "far")
    (codes / "gone.safetensors").symlink_to("nowhere")
    assert musiclm_command("codec", "decode", codes, "--out", tmp_path / "back", "--codec", codec) == 0
    assert set(listing(tmp_path / "back")) == {"a.wav", "sub", "sub/a.wav"}
    assert "gone.safetensors: the link points to a missing file" in capsys.readouterr().err


def test_names_that_are_not_utf8(musiclm_command, codec, write_tone, tmp_path):
    """Encode, decode and evaluate work on a folder with a Latin-1 name."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copy(write_tone("a.wav", 0.1), folder / "a.wav")
    assert musiclm_command("codec", "encode", folder, "--out", folder / "codes", "--codec", codec) == 0
    assert musiclm_command("codec", "decode", folder / "codes", "--out", folder / "back", "--codec", codec) == 0
    assert musiclm_command("codec", "evaluate", folder, "--json", tmp_path / "x.json", "--codec", codec) == 0
    assert read_json(tmp_path / "x.json")["settings"]["source"] == str(folder)


LONG_FILE = """
import resource, sys
from musiclm_pytorch.cli import main
source, codes, out, codec = sys.argv[1:]
def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
short = [main(["codec", "encode", "short.wav", "--out", codes, "--codec", codec]),
         main(["codec", "decode", codes, "--out", out, "--codec", codec])]
before = peak_mb()
long = [main(["codec", "encode", source, "--out", codes, "--codec", codec]),
        main(["codec", "decode", codes, "--out", out, "--codec", codec])]
sys.exit(f"{short} {long} {peak_mb() - before:.0f} MB" if any(short + long) or peak_mb() - before > 60 else 0)
"""


@pytest.mark.slow
def test_long_files_need_no_more_memory(codec, tmp_path):
    """Ten minutes at 44.1 kHz stereo (212 MB as floats) need about as much memory as two seconds."""
    second = np.random.default_rng(0).standard_normal((44100, 2)).astype("float32") * 0.1
    for name, seconds in (("short.wav", 10), ("long.wav", 600)):
        with soundfile.SoundFile(tmp_path / name, "w", samplerate=44100, channels=2) as file:
            for _ in range(seconds):
                file.write(second)
    words = [sys.executable, "-c", LONG_FILE, "long.wav", "a.safetensors", "a.wav", str(codec)]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert soundfile.info(tmp_path / "a.wav").frames == 600 * 8000
