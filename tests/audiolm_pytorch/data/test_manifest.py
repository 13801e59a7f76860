"""Folders and manifests: every usable file is found, every other one is named with a reason."""

import json
import logging
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.stream import AudioSource
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.items import AudioItem, ItemEntry
from audiolm_pytorch.data.manifest import load_items, load_split, manifest_text, split_items


def write_manifest(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    """Write objects, or raw text, as lines."""
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def fake_items(names: Sequence[str]) -> list[AudioItem]:
    """Items without files."""
    return [AudioItem(Path(name), None, {}, 16000, 16000) for name in names]


def test_a_folder_is_listed_in_order_with_lengths(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards recursion, order, upper-case suffixes, hidden leftovers and files that are not sounds."""
    for name in ["b/2.wav", "a/1.flac", "b/10.OGG"]:
        write_tone(name, seconds=0.5, sample_hz=16000)
    (tmp_path / "b" / "._2.wav").write_bytes(b"resource fork of another system")
    (tmp_path / "b" / "cover.jpg").write_bytes(b"picture")
    report = load_items(tmp_path)
    assert [item.path.relative_to(tmp_path).as_posix() for item in report.items] == ["a/1.flac", "b/10.OGG", "b/2.wav"]
    assert all((item.sample_hz, item.num_samples, item.caption) == (16000, 8000, None) for item in report.items)
    assert report.rejected == []


def test_mixed_and_broken_folder(
    tmp_path: Path, write_tone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Guards a typical folder: an mp3 at 44.1 kHz in stereo, and one warning for six files that cannot be used."""
    write_tone("good.wav")
    hz = 44100
    soundfile.write(tmp_path / "song.mp3", np.random.default_rng(0).uniform(-0.1, 0.1, (hz, 2)), hz)
    write_tone("short.wav", seconds=0.1)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("lyrics " * 50)
    (tmp_path / "corrupt.flac").write_bytes(b"fLaC" + bytes(200))
    soundfile.write(tmp_path / "nan.wav", np.full(48000, np.nan), 24000, subtype="FLOAT")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 24000)
    with caplog.at_level(logging.WARNING):
        report = load_items(str(tmp_path), min_seconds=0.5)
    assert [item.path.name for item in report.items] == ["good.wav", "song.mp3"]
    assert report.items[1].sample_hz == hz and report.items[1].num_samples >= hz
    reasons = {item.path.name: item.reason for item in report.rejected}
    assert reasons["short.wav"] == "too short: 0.100 s, at least 0.5 s are needed"
    assert reasons["empty.wav"] == "the file is empty (0 bytes)"
    assert reasons["text.wav"].startswith("cannot be read as audio")
    assert reasons["corrupt.flac"].startswith("cannot be read as audio")
    assert reasons["nan.wav"].startswith("the file contains NaN or infinite samples")
    assert "no samples" in reasons["nothing.wav"]
    assert len(caplog.records) == 1 and all(name in caplog.text for name in reasons)


def test_a_truncated_file_counts_what_can_be_decoded(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards lengths of interrupted downloads, whose headers hold larger ones."""
    path = write_tone("cut.wav", seconds=1.0, sample_hz=16000)
    path.write_bytes(path.read_bytes()[: 44 + 2 * 4000])
    soundfile.write(tmp_path / "cut.mp3", np.random.default_rng(0).uniform(-0.1, 0.1, 3 * 44100), 44100)
    mp3 = (tmp_path / "cut.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(mp3[: len(mp3) // 2])
    items = {item.path.name: item for item in load_items(tmp_path).items}
    assert items["cut.wav"].num_samples == 4000
    assert items["cut.mp3"].num_samples == read_audio(tmp_path / "cut.mp3")[0].shape[1] < 2 * 44100


def test_a_hole_in_a_file_is_damage(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards times behind a hole in an ogg file, where libraries disagree."""
    write_tone("good.wav")
    soundfile.write(tmp_path / "hole.ogg", np.random.default_rng(0).uniform(-0.1, 0.1, 3 * 44100), 44100)
    data = bytearray((tmp_path / "hole.ogg").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    (tmp_path / "hole.ogg").write_bytes(data)
    rejected = load_items(tmp_path).rejected
    assert len(rejected) == 1 and "of 132300 samples can be decoded" in rejected[0].reason


def test_an_mp3_that_guesses_its_length_is_measured(tmp_path: Path) -> None:
    """Guards MP3 files without an index, whose length libsndfile overestimates several times."""
    path = tmp_path / "a.mp3"
    fading_in = np.random.default_rng(0).uniform(-0.1, 0.1, 2 * 44100) * np.linspace(0, 1, 2 * 44100) ** 3
    with soundfile.SoundFile(path, "w", 44100, 1, bitrate_mode="VARIABLE", compression_level=0.5) as file:
        file.write(fading_in)
    mp3 = path.read_bytes()
    path.write_bytes(mp3[mp3.index(b"\xff\xfb", mp3.index(b"Xing")) :])
    assert AudioSource(path).info.num_samples > 3 * 44100
    (item,) = load_items(tmp_path).items
    assert 2 * 44100 <= item.num_samples < 2.1 * 44100
    crop = CropDataset([item], 1.0, [24000], cache_bytes=0).get(3, 0)
    assert crop.waves[24000].shape == (24000,)


@pytest.mark.parametrize("make", ["missing", "empty", "only_text", "a_file"])
def test_sources_without_audio_are_errors(tmp_path: Path, write_tone: Callable[..., Path], make: str) -> None:
    """Guards the mistakes of a first run: a wrong path, an empty folder, nothing usable, a file for a folder."""
    source, message = tmp_path / "corpus", "no such folder or manifest"
    if make == "empty":
        source.mkdir()
        message = r"the folder has no audio files and no train\.jsonl"
    elif make == "only_text":
        source.mkdir()
        (source / "a.wav").write_text("text" * 50)
        message = "none of 1 audio files can be used: .*a.wav"
    elif make == "a_file":
        source = write_tone()
        message = "is a file; pass its folder"
    with pytest.raises(ValueError, match=message):
        load_items(source)


def test_a_manifest_gives_captions_and_labels(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards captions (any language, a byte order mark), labels, paths relative to the manifest and outside of it."""
    inside, outside = write_tone("data/clips/a.wav"), write_tone("elsewhere/b.wav")
    lines: list[dict[str, Any] | str] = [
        {"audio": "clips/a.wav", "caption": "eine Flöte", "tempo": "fast", "bpm": 161.6},
        "",
        {"audio": "../elsewhere/b.wav", "caption": None},
        {"audio": str(outside)},
    ]
    manifest = write_manifest(tmp_path / "data" / "songs.jsonl", lines)
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    items = load_items(manifest).items
    assert [item.caption for item in items] == ["eine Flöte", None, None]
    assert items[0].labels == {"tempo": "fast", "bpm": 161.6} and items[1].labels == {}
    assert items[0].path == inside and items[1].path.samefile(outside) and items[2].path == outside


@pytest.mark.parametrize(
    ("said", "caption", "further"),
    [
        ({"caption": "a"}, "a", None),
        ({"caption": ["a", "b", "a"]}, "a", ["b"]),
        ({"caption": {"main": "a", "short": ["b", "c"], "none": None}}, "a", ["b", "c"]),
        ({"caption": "a", "captions": "b"}, "a", ["b"]),
        ({"caption": "a", "captions": ["a", "b"]}, "a", ["a", "b"]),
        ({"captions": ["", None, "b", "c"]}, "b", ["c"]),
        ({"caption": " ", "captions": {"x": "b"}}, "b", None),
        ({"caption": None, "captions": []}, None, None),
    ],
)
def test_captions_come_in_every_form(
    tmp_path: Path,
    write_tone: Callable[..., Path],
    said: dict[str, Any],
    caption: str | None,
    further: list[str] | None,
) -> None:
    """Guards texts, lists and texts by name: the first is the caption of the item, the others are its label."""
    write_tone("a.wav", seconds=0.1)
    (item,) = load_items(write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "mood": "calm", **said}])).items
    assert item.caption == caption
    assert item.labels == {"mood": "calm"} | ({"captions": further} if further else {})


def test_a_folder_reads_the_files_beside_its_clips(
    tmp_path: Path, write_tone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Guards captions beside clips: lines of text, JSON with labels, both, neither, and names with dots in them."""
    for name in ["bare", "both", "json", "lines", "one.two", "sub/upper"]:
        write_tone(f"{name}.wav", seconds=0.1)
    (tmp_path / "lines.txt").write_bytes("\ufeffa flute\r\n\r\n  a fast flute \r\n".encode())
    (tmp_path / "one.two.txt").write_text("a harp", encoding="utf-8")
    (tmp_path / "one.txt").write_text("of no clip", encoding="utf-8")
    (tmp_path / "sub" / "upper.TXT").write_text("a horn", encoding="utf-8")
    (tmp_path / "json.json").write_text(json.dumps({"caption": "a", "captions": ["b"], "mood": "calm"}))
    (tmp_path / "both.json").write_text(json.dumps({"caption": "a", "mood": "calm", "audio": "/etc/passwd"}))
    (tmp_path / "both.txt").write_text("b\na")
    report = load_items(tmp_path)
    said = {item.path.stem: (item.caption, item.labels) for item in report.items}
    assert said == {
        "bare": (None, {}),
        "both": ("a", {"mood": "calm", "captions": ["b"]}),
        "json": ("a", {"mood": "calm", "captions": ["b"]}),
        "lines": ("a flute", {"captions": ["a fast flute"]}),
        "one.two": ("a harp", {}),
        "upper": ("a horn", {}),
    }
    assert report.rejected == [] and "not read: one.txt; captions" in caplog.text
    assert all(item.path.parent in (tmp_path, tmp_path / "sub") for item in report.items)


BAD_SIDECARS = {
    "json": ("a.json", b'{"caption":\n "a" "b"}', "not JSON (Expecting ',' delimiter: line 2 column 6"),
    "list": ("a.json", b'["a"]', "must be a JSON object, {...}, got list"),
    "number": ("a.json", b'{"caption": [1]}', "'caption' must be a text"),
    "deep": ("a.json", b"[" * 100_000, "not JSON"),
    "long number": ("a.json", b'{"bpm": ' + b"1" * 10_000 + b"}", "not JSON"),
    "surrogate": ("a.json", b'{"caption": "\\ud83d"}', "'caption' must be a text"),
    "latin": ("a.txt", "flöte".encode("latin-1"), "not UTF-8"),
    "large": ("a.txt", b"la " * 2**19, "shorten it to 1048576 bytes or fewer"),
}


def test_tables_of_captions_lose_nothing_in_silence(
    tmp_path: Path, write_tone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of one file are joined, and what is not read is named: contradictions, separators, unknown tables."""
    write_tone("a.wav", seconds=0.1)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,caption\na.wav,a flute\na.wav,a harp\n")
    (tmp_path / "train.csv").write_text("audio,caption\na.wav,x\n")
    (item,) = load_items(tmp_path).items
    assert (item.caption, item.labels) == ("a flute", {"captions": ["a harp"]})
    assert "not read: train.csv; captions of x.wav belong in x.txt" in caplog.text
    for text, reason in [
        ("file_name,mood\na.wav,calm\na.wav,wild\n", "two rows of a.wav have different ['mood']"),
        ("file_name;caption\na.wav;a flute\n", "got ['file_name;caption']; separate the columns with commas"),
    ]:
        table.write_text(text)
        (rejected,) = load_items(tmp_path).rejected
        assert rejected.path == table and reason in rejected.reason


@pytest.mark.parametrize("case", BAD_SIDECARS)
def test_a_bad_file_beside_a_clip_is_named_and_the_clip_kept(
    tmp_path: Path, write_tone: Callable[..., Path], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards foreign and hostile files of a folder: the clip is used, and unreadable files are reported."""
    name, data, message = BAD_SIDECARS[case]
    clip = write_tone("a.wav", seconds=0.1)
    (tmp_path / name).write_bytes(data)
    other = {"a.json": "a.txt", "a.txt": "a.json"}[name]
    (tmp_path / other).write_text('{"captions": ["kept"]}' if other == "a.json" else "kept")
    report = load_items(tmp_path)
    assert [(item.path, item.caption, item.labels) for item in report.items] == [(clip, "kept", {})]
    (rejected,) = report.rejected
    assert rejected.path == tmp_path / name and message in rejected.reason
    assert "fix or delete it, a.wav is used without it" in rejected.reason
    assert len(caplog.records) == 1 and name in caplog.text


def test_a_manifest_can_be_written_and_moved(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards a round trip: paths are relative below the folder of the manifest, and absolute elsewhere."""
    inside, outside = write_tone("data/clips/a.wav"), write_tone("elsewhere/b.wav")
    lines: list[dict[str, Any] | str] = [
        {"audio": "clips/a.wav", "caption": ["Flöte\nund 笛", '"x"'], "aspects": ["a, b"], "tempo": None},
        {"audio": str(outside)},
    ]
    items = load_items(write_manifest(tmp_path / "data" / "train.jsonl", lines)).items
    text = manifest_text(items, tmp_path / "data")
    assert [json.loads(line)["audio"] for line in text.splitlines()] == ["clips/a.wav", str(outside)]
    (tmp_path / "data" / "train.jsonl").write_text(text)
    assert load_items(tmp_path / "data").items == items
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = load_items(tmp_path / "moved").items
    assert moved[0].path == tmp_path / "moved" / "clips" / inside.name and moved[0].labels == items[0].labels
    assert (
        json.loads(manifest_text([ItemEntry(inside, "a", {"audio": "/etc/passwd"})], tmp_path))["audio"]
        != "/etc/passwd"
    )
    with pytest.raises(ValueError, match="a.wav: JSON cannot store the labels"):
        manifest_text([ItemEntry(inside, None, {"bpm": float("nan")})], tmp_path)


def test_train_manifest_decides_for_its_folder(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards against files of a folder that its manifest does not name."""
    write_tone("a.wav")
    write_tone("not_listed.wav")
    write_manifest(tmp_path / "train.jsonl", [{"audio": "a.wav"}])
    assert [item.path.name for item in load_items(tmp_path).items] == ["a.wav"]


def test_a_folder_may_be_called_like_a_manifest(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """A folder with the suffix .jsonl is searched for audio, not read as text."""
    write_tone("takes.jsonl/a.wav")
    assert [item.path.name for item in load_items(tmp_path / "takes.jsonl").items] == ["a.wav"]


def test_a_missing_file_of_a_manifest_is_rejected(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards a long manifest from failing for one lost file."""
    write_tone("a.wav")
    report = load_items(write_manifest(tmp_path / "m.jsonl", [{"audio": "gone.wav"}, {"audio": "a.wav"}]))
    assert [item.path.name for item in report.items] == ["a.wav"]
    assert [(item.path.name, item.reason) for item in report.rejected] == [("gone.wav", "no such file")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "a.wav"', "line 2: the text is not JSON"),
        ('["a.wav"]', "line 2: the text must be a JSON object, {...}, got list"),
        ('{"file": "a.wav"}', "line 2: needs the field 'audio' (or 'file_name'), got ['file']"),
        (
            '{"audio": "a.wav", "caption": 3}',
            "line 2: 'caption' must be a text, a list of texts, or a dict of texts, which UTF-8 can store, got 3",
        ),
        ('{"audio": "a.wav", "captions": [["a", ["b"]]]}', "line 2: 'captions' must be a text, a list"),
        ('{"audio": ' + "[" * 100_000, "line 2: the text is not JSON"),
        ('{"audio": "a.wav", "bpm": ' + "1" * 10_000 + "}", "line 2: the text is not JSON"),
        ('{"audio": "' + "a" * 2**24 + '"}', "line 2: the line is longer than 16777216 bytes"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, write_tone: Callable[..., Path], line: str, message: str) -> None:
    """Guards the message of a broken manifest: file, line and reason."""
    write_tone("a.wav")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav"}, line])
    with pytest.raises(ValueError, match=re.escape(f"m.jsonl, {message}")):
        load_items(manifest)


def test_a_manifest_in_another_encoding_is_named(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards tables saved by other programs: the message names the line, and an impossible path is a rejected file."""
    write_tone("a.wav")
    (tmp_path / "m.jsonl").write_bytes('{"audio": "a.wav"}\n{"audio": "flöte.wav"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="m.jsonl, line 2: the text is not UTF-8"):
        load_items(tmp_path / "m.jsonl")
    report = load_items(write_manifest(tmp_path / "n.jsonl", [{"audio": "a.wav"}, {"audio": "a\0b.wav"}]))
    assert len(report.items) == len(report.rejected) == 1


def test_a_manifest_without_line_ends_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Guards against a file that is not a manifest: a sparse 256 MiB of zeros, of which 16 are read."""
    with (tmp_path / "m.jsonl").open("wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="m.jsonl, line 1: the line is longer than 16777216 bytes"):
            load_items(tmp_path / "m.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_manifests_that_are_missing_or_empty_are_errors(tmp_path: Path) -> None:
    """Guards the wrong path of a manifest."""
    with pytest.raises(ValueError, match="gone.jsonl: the manifest does not exist"):
        load_items(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="the manifest has no lines"):
        load_items(write_manifest(tmp_path / "m.jsonl", ["", " "]))


def test_the_split_is_a_partition_that_does_not_move() -> None:
    """Guards validation data from leaking into training when files are added, reordered or moved."""
    names = [f"/music/{number}.wav" for number in range(400)]
    train, valid = split_items(fake_items(names), valid_fraction=0.1)
    assert sorted(str(item.path) for item in train + valid) == sorted(names)
    assert 20 <= len(valid) <= 60
    held_out = {item.path.name for item in valid}
    fewer_train, fewer_valid = split_items(fake_items([f"/moved/{number}.wav" for number in range(199, -1, -1)]), 0.1)
    assert {item.path.name for item in fewer_valid} == held_out & {item.path.name for item in fewer_train + fewer_valid}
    assert {item.path.name for item in split_items(fake_items(names), 0.1, seed=1)[1]} != held_out


@pytest.mark.parametrize("fraction", [0.0, 0.05, 1.0])
def test_both_sides_of_a_split_get_something(fraction: float) -> None:
    """Guards tiny data sets from an empty validation or training set."""
    for num_items in [2, 3, 5]:
        train, valid = split_items(fake_items([f"{number}.wav" for number in range(num_items)]), fraction)
        assert train and valid and len(train) + len(valid) == num_items
    assert [len(side) for side in split_items(fake_items(["only.wav"]), fraction)] == [1, 0]


def test_files_of_one_name_in_many_folders_are_split_too() -> None:
    """Guards stems such as song/mix.wav, whose file names are all the same."""
    names = [f"/music/{number}/mix.wav" for number in range(200)]
    assert 5 <= len(split_items(fake_items(names), 0.1)[1]) <= 45


def test_a_folder_with_two_manifests_is_split_by_them(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    """Guards a published split from being mixed again; without one, the hash decides."""
    folder = write_folder(num_files=4, seconds=0.1)
    assert {item.path.name for side in load_split(folder) for item in side} == {f"{i:03d}.wav" for i in range(4)}
    write_manifest(folder / "train.jsonl", [{"audio": "000.wav"}, {"audio": "001.wav"}])
    write_manifest(folder / "valid.jsonl", [{"audio": "003.wav"}])
    train, valid = load_split(folder)
    assert [item.path.name for item in train] == ["000.wav", "001.wav"]
    assert [item.path.name for item in valid] == ["003.wav"]


def test_impossible_splits_are_refused() -> None:
    """Guards the fraction and the empty list."""
    with pytest.raises(ValueError, match="valid_fraction"):
        split_items(fake_items(["a.wav"]), 1.5)
    with pytest.raises(ValueError, match="at least one item"):
        split_items([])
