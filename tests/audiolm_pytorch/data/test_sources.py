"""Sources of data: folders with links, other formats and tables, lists of folders, and torch data sets."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import Dataset, IterableDataset

from audiolm_pytorch.audio.files import decoded_info, read_audio
from audiolm_pytorch.data import AudioItem, CropDataset, items_digest, load_items, load_split
from audiolm_pytorch.data.items import Requirements, content_digest
from audiolm_pytorch.data.manifest import captions_of, manifest_text, training_items
from audiolm_pytorch.data.wave_dataset import dataset_items

WriteTone = Callable[..., Path]


def names_of(items: list[AudioItem], folder: Path) -> list[str]:
    """Paths of items relative to a folder."""
    return [item.path.relative_to(folder).as_posix() for item in items]


def write_lines(path: Path, *lines: Any) -> Path:
    """Write JSON objects as lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


# formats and links


def test_every_format_of_libsndfile_is_used_and_others_are_named(
    tmp_path: Path, write_tone: WriteTone, caplog: pytest.LogCaptureFixture
) -> None:
    """A sound is used or reported, never dropped without a word."""
    formats = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "ogg": "OGG", "oga": "OGG", "aiff": "AIFF", "aif": "AIFF"}
    formats |= {
        "aifc": "AIFF",
        "au": "AU",
        "caf": "CAF",
        "w64": "W64",
        "rf64": "RF64",
        "wave": "WAV",
        "snd": "AU",
        "sph": "NIST",
    }
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 24000)
    for suffix, name in formats.items():
        soundfile.write(tmp_path / f"{suffix}.{suffix}", wave, 24000, format=name)
    soundfile.write(tmp_path / "x.opus", wave, 24000, format="OGG", subtype="OPUS")
    for suffix in ("m4a", "aac", "webm", "mp4", "wma", "MKV", "ra", "opus.part"):
        (tmp_path / f"no.{suffix}").write_bytes(b"\0" * 100)
    (tmp_path / "cover.jpg").write_bytes(b"picture")
    with caplog.at_level(logging.WARNING):
        report = load_items(tmp_path)
    assert {item.path.suffix for item in report.items} == {f".{suffix}" for suffix in (*formats, "opus")}
    assert len(report.rejected) == 8 and all("cannot be decoded" in item.reason for item in report.rejected)
    assert len(caplog.records) == 1 and caplog.text.count("no.m4a") == 1 and "cover.jpg" not in caplog.text


def test_links_are_followed_once_and_broken_links_are_named(tmp_path: Path, write_tone: WriteTone) -> None:
    """A linked folder is part of the data; a circle, a second link and a dangling link are not, and are reported."""
    data = tmp_path / "data"
    write_tone("data/a.wav", 0.2)
    write_tone("elsewhere/deep/b.wav", 0.2)
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(tmp_path / "elsewhere")
    (data / "circle").symlink_to(data)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (data / "itself").symlink_to(data / "itself")
    (data / "gone.wav").symlink_to(tmp_path / "gone.wav")
    (data / "file.wav").symlink_to(data / "a.wav")
    os.mkfifo(data / "pipe.wav")
    report = load_items(data)
    assert names_of(report.items, data) == ["a.wav", "again/deep/b.wav", "file.wav"]
    reasons = {item.path.relative_to(data).as_posix(): item.reason for item in report.rejected}
    assert {"circle", "gone.wav", "itself", "link", "pipe.wav"} < set(reasons)
    assert reasons.pop("pipe.wav") == "is not a regular file"
    assert "are listed already" in reasons["link"] and "are listed already" in reasons["circle"]
    assert "missing file or to itself" in reasons["gone.wav"] and "missing file or to itself" in reasons["itself"]


def test_a_real_folder_is_preferred_to_a_link_to_it(tmp_path: Path, write_tone: WriteTone) -> None:
    """The names of files do not depend on links that are sorted before the folder."""
    write_tone("data/z/a.wav", 0.2)
    (tmp_path / "data" / "a_link").symlink_to(tmp_path / "data" / "z")
    report = load_items(tmp_path / "data")
    assert names_of(report.items, tmp_path / "data") == ["z/a.wav"] and len(report.rejected) == 1


def test_names_in_any_encoding_are_read_and_escaped_in_logs(
    tmp_path: Path, write_tone: WriteTone, caplog: pytest.LogCaptureFixture
) -> None:
    """Latin-1 names are read, split and written as a manifest; control characters do not reach the terminal."""
    good = write_tone("data/good.wav", 0.2)
    latin = good.with_name(os.fsdecode(b"fl\xf6te.wav"))
    good.rename(latin)
    hostile = [latin.with_name("a\nINFO all is well.wav"), latin.with_name("b\x1b[2J.wav")]
    for path in hostile:
        path.write_text("text")
    with caplog.at_level(logging.WARNING):
        train, valid = load_split(tmp_path / "data")
    assert [item.path for item in (*train, *valid)] == [latin]
    message = caplog.messages[0]
    assert message.isprintable() and r"a\nINFO" in message and r"b\x1b[2J" in message
    assert read_audio(latin)[0].shape == (1, 4800)
    manifest = tmp_path / "data" / "train.jsonl"
    manifest.write_text(manifest_text(train, manifest.parent))
    assert [item.path for item in load_items(manifest).items] == [latin]
    for item in hostile:
        item.unlink()
    latin.rename(hostile[0])
    (tmp_path / "data" / "train.jsonl").unlink()
    assert [item.path for item in load_items(tmp_path / "data").items] == [hostile[0]]


def test_clips_of_evaluations_are_no_training_data(tmp_path: Path, write_tone: WriteTone) -> None:
    """A report in a folder inside the data does not add its codec copies and generated clips to the data."""
    write_tone("data/a.wav", 0.2)
    write_tone("data/generated/b.wav", 0.2)
    before = load_items(tmp_path / "data").items
    assert len(before) == 2
    for name in ("codec_copies", "generated"):
        write_tone(f"data/report/{name}/00000.flac", 0.2)
        (tmp_path / "data" / "report" / name / "manifest.jsonl").write_text("{}\n")
    report = load_items(tmp_path / "data")
    assert report.items == before
    assert [item.reason for item in report.rejected] == ["clips of an evaluation"] * 2


def test_files_for_training_and_validation_are_reported(
    tmp_path: Path, write_tone: WriteTone, caplog: pytest.LogCaptureFixture
) -> None:
    """In two manifests, or in two lists of items: validation would measure what was memorised."""
    for name in ("a", "b"):
        write_tone(f"{name}.wav", 0.2)
    (tmp_path / "train.jsonl").write_text('{"audio": "a.wav"}\n{"audio": "b.wav"}\n')
    (tmp_path / "valid.jsonl").write_text('{"audio": "b.wav"}\n')
    items = load_split(tmp_path)
    assert "1 of 1 validation files are also training files" in caplog.text
    caplog.clear()
    training_items(None, items)
    assert "1 of 1 validation files are also training files" in caplog.text


def test_samples_of_runs_are_no_training_data(tmp_path: Path, write_tone: WriteTone) -> None:
    """A run in a folder inside the data, or in the data itself, does not add its own samples to the data."""
    write_tone("data/a.wav", 0.2)
    write_tone("data/samples/b.wav", 0.2)
    before = load_items(tmp_path / "data").items
    assert len(before) == 2
    write_tone("data/out/codec/samples/0_step.wav", 0.2)
    (tmp_path / "data" / "out" / "codec" / "metrics.jsonl").write_text("{}\n")
    write_tone("data/out/samples/1.wav", 0.2)
    (tmp_path / "data" / "out" / "run.json").write_text("{}\n")
    report = load_items(tmp_path / "data")
    assert report.items == before
    assert [(item.path.name, item.reason) for item in report.rejected] == [("samples", "samples of a training run")] * 2


@pytest.mark.slow
def test_a_trainer_continues_with_its_folder_inside_the_data(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    """The samples of the first steps neither change the data of the run nor stop it."""
    from audiolm_pytorch.codecs.training.trainer import SoundStreamTrainer
    from tests.audiolm_pytorch.audio.test_waves import codec

    folder = write_folder(num_files=3, seconds=0.3, sample_hz=16000)
    for _ in range(2):
        trainer = SoundStreamTrainer(
            codec(),
            folder=folder,
            batch_size=2,
            num_train_steps=2,
            data_max_length=1600,
            validate_every=1,
            unquantized_steps=0,
            results_folder=folder / "run",
        )
        trainer.train(stop_after_steps=1)
    assert trainer.loop.is_finished and list((folder / "run" / "samples").iterdir())


def test_unreadable_folders_are_reported(tmp_path: Path, write_tone: WriteTone) -> None:
    """A folder without permission is named; root may read it."""
    write_tone("data/a.wav", 0.2)
    closed = tmp_path / "data" / "closed"
    closed.mkdir()
    closed.chmod(0)
    try:
        report = load_items(tmp_path / "data")
    finally:
        closed.chmod(0o700)
    assert len(report.items) == 1 and (os.geteuid() == 0 or "cannot be read" in report.rejected[0].reason)


# reasons


REASONS = {
    "page.mp3": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>" * 50, "it is a web page; download"),
    "page.wav": ("\ufeff  <html>Größe</html>".encode(), "it is a web page"),
    "tag.mp3": (b"ID3\x04\0\0\0\0\x02\0" + bytes(256), "it has an ID3 tag and no audio"),
    "lfs.flac": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "it is a pointer of Git LFS; .*git lfs pull",
    ),
    "text.wav": ("Größe".encode() * 40, "it is a text file"),
    "song.wav": (b"\0\0\0\x20ftypM4A " + bytes(100), "it is an MP4 or M4A file; convert it"),
    "clip.opus": (b"\x1aE\xdf\xa3" + bytes(100), "it is a WebM or Matroska file; convert it"),
    "zip.wav": (b"PK\x03\x04" + bytes(100), "it is a zip archive"),
    "zeros.wav": (bytes(5000), "it begins with zeros"),
    "noise.wav": (bytes(range(256)) * 20, "its format is not recognised"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_true_reason_is_given(tmp_path: Path, name: str) -> None:
    """libsndfile reports a missing file or a pipe for many of these."""
    data, reason = REASONS[name]
    (tmp_path / name).write_bytes(data)
    for call in (decoded_info, read_audio):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as audio .{reason}") as caught:
            call(tmp_path / name)
        assert "pipe" not in str(caught.value)


@pytest.mark.parametrize("value", [1e10, 3e38, -32768.0])
def test_implausible_samples_of_float_files_are_left_out(tmp_path: Path, write_tone: WriteTone, value: float) -> None:
    """Samples far above full scale would be trained on as garbage; a float file with a peak of 8 is used."""
    write_tone("good.wav", 0.2)
    for name, peak in (("loud.wav", value), ("hot.wav", 8.0)):
        soundfile.write(tmp_path / name, np.array([0.0, peak, 0.1] * 100), 24000, subtype="FLOAT")
    report = load_items(tmp_path)
    assert [item.path.name for item in report.items] == ["good.wav", "hot.wav"]
    (rejected,) = report.rejected
    assert "the file must have values in -1..1, got samples from" in rejected.reason
    with pytest.raises(ValueError, match="loud.wav"):
        read_audio(tmp_path / "loud.wav")


@pytest.mark.parametrize("hz", [1, 999, 768_001, 2**31 - 1])
def test_files_that_claim_impossible_rates_are_left_out(tmp_path: Path, write_tone: WriteTone, hz: int) -> None:
    """A file of 60 kB at 1 Hz would become gigabytes."""
    write_tone("good.wav", 0.2)
    path = write_tone("bad.wav", 0.2)
    data = bytearray(path.read_bytes())
    data[24:28] = hz.to_bytes(4, "little")
    path.write_bytes(data)
    (rejected,) = load_items(tmp_path).rejected
    assert rejected.reason == f"the sample rate of the file must be in 1000..768000 Hz, got {hz}"
    with pytest.raises(ValueError, match="1000..768000"):
        read_audio(path, 24000)


# requirements


def test_channels_are_tested_when_files_are_listed(
    tmp_path: Path, write_tone: WriteTone, caplog: pytest.LogCaptureFixture
) -> None:
    """A 5.1 file is left out for a stereo model, mixed down for a mono model, and refused among items."""
    for name, channels in (("mono", 1), ("stereo", 2), ("surround", 6)):
        write_tone(f"data/{name}.wav", 0.2, channels=channels)
    with caplog.at_level(logging.WARNING):
        report = load_items(tmp_path / "data", channels=2)
    assert [item.path.stem for item in report.items] == ["mono", "stereo"]
    assert report.rejected[0].reason.startswith("has 6 channels, 1 or 2 are needed") and len(caplog.records) == 1
    everything = load_items(tmp_path / "data").items
    assert [item.channels for item in everything] == [1, 2, 6]
    assert all(item.read(24000).shape == (1, 4800) for item in everything)
    by_hand = AudioItem(tmp_path / "data" / "surround.wav", None, {}, 24000, 4800)
    for item in (everything[2], by_hand):
        with pytest.raises(ValueError, match="1 items cannot be used; remove them: .*surround.wav .has 6 channels"):
            training_items(None, (everything[:2], [item]), channels=2)
    with pytest.raises(ValueError, match="2 items cannot be used.*too short"):
        training_items(None, (everything[:2], []), min_seconds=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [False, True])
def test_a_stereo_codec_trains_on_a_folder_with_a_surround_file(
    write_tone: WriteTone, tmp_path: Path, noise: bool
) -> None:
    """The file is left out at the start, also from noise, and training does not die when it is drawn."""
    from audiolm_pytorch.codecs.training.trainer import SoundStreamTrainer
    from audiolm_pytorch.nn.film import FiLM
    from tests.audiolm_pytorch.audio.test_waves import codec

    for name, channels in (("a", 2), ("b", 1), ("c", 6), ("d", 2)):
        write_tone(f"data/{name}.wav", 0.3, 16000, channels=channels)
    model = codec(channels=2)
    options: dict[str, Any] = {}
    if noise:
        model.denoising = FiLM(dim=model.encoder.dim)
        options["noise_folder"] = tmp_path / "data"
    trainer = SoundStreamTrainer(
        model,
        folder=tmp_path / "data",
        batch_size=6,
        num_train_steps=1,
        data_max_length=1600,
        results_folder=tmp_path / "run",
        **options,
    )
    assert trainer.task.num_items + len(trainer.task.valid.items) in (3, 4)
    assert all(item.path.stem != "c" for item in (*trainer.task.train.items, *trainer.task.valid.items))
    assert trainer.train().step == 1


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"min_seconds": -1.0}, {"min_seconds": float("nan")}])
def test_impossible_requirements_are_refused(wrong: dict[str, Any]) -> None:
    """Names the requirement."""
    with pytest.raises(ValueError, match="min_seconds >= 0 and channels >= 1|min_seconds must be a number"):
        Requirements(**wrong)


# contents


def test_the_digest_finds_every_change_of_a_small_file(tmp_path: Path, write_tone: WriteTone) -> None:
    """Size and blocks at the start, in the middle and at the end of a file are part of its identity."""
    path = write_tone("a.wav", 0.2)
    items = load_items(tmp_path).items
    digest, data = items_digest(items), path.read_bytes()
    assert items[0].digest == content_digest(path) and digest.startswith("1 files, ")
    for place in (100, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert items_digest(load_items(tmp_path).items) != digest
    path.write_bytes(data)
    assert items_digest(load_items(tmp_path).items) == digest
    (tmp_path / "moved").mkdir()
    path.rename(tmp_path / "moved" / "a.wav")
    assert items_digest(load_items(tmp_path / "moved").items) == digest
    by_hand = AudioItem(tmp_path / "moved" / "a.wav", None, {}, items[0].sample_hz, items[0].num_samples)
    assert items_digest([by_hand]) == digest


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("change", ["shorter", "other rate", "longer", "gone", "text", "empty"])
def test_a_file_that_changes_after_the_scan_is_named(
    tmp_path: Path, write_tone: WriteTone, cache_bytes: int, change: str
) -> None:
    """A crop of the changed file raises an error with its name; without the check, crops are short or empty."""
    path = write_tone("song.wav", 1.0, 24000)
    data = CropDataset(load_items(tmp_path).items, 0.5, [24000], cache_bytes=cache_bytes)
    numbers = {"shorter": (0.1, 24000), "other rate": (1.0, 8000), "longer": (2.0, 24000)}
    if change in numbers:
        write_tone("song.wav", *numbers[change])
    elif change == "gone":
        path.unlink()
    else:
        path.write_text("text" if change == "text" else "")
    with pytest.raises(ValueError, match=r"song.wav: (has .* when it was listed|no such file)"):
        data.get(0, 0)


def test_items_without_a_digest_are_still_checked_for_their_length(tmp_path: Path, write_tone: WriteTone) -> None:
    """Items that a user builds by hand have no digest."""
    item = AudioItem(write_tone("song.wav", 0.5, 24000), None, {}, 24000, 24000)
    for cache_bytes in (0, 2**30):
        with pytest.raises(ValueError, match="song.wav: has .* samples from"):
            CropDataset([item], None, [24000], cache_bytes=cache_bytes).get(0, 0)


def test_a_replaced_training_file_stops_the_run(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    """Another sound of the same name, length and rate is other data; a moved folder is the same data."""
    from audiolm_pytorch.codecs.training.trainer import SoundStreamTrainer
    from tests.audiolm_pytorch.audio.test_waves import codec

    folder = write_folder(num_files=3, seconds=0.3, sample_hz=16000)

    def train(folder: Path) -> int:
        return (
            SoundStreamTrainer(
                codec(),
                folder=folder,
                batch_size=2,
                num_train_steps=3,
                data_max_length=1600,
                unquantized_steps=0,
                results_folder=tmp_path / "run",
            )
            .train(stop_after_steps=1)
            .step
        )

    assert train(folder) == 1
    folder = folder.rename(tmp_path / "moved")
    assert train(folder) == 2
    (folder / "001.wav").write_bytes((folder / "002.wav").read_bytes())
    with pytest.raises(ValueError, match="data: found 3 files, .* expected 3 files"):
        train(folder)


# manifests


def test_tables_of_hugging_face_give_captions(tmp_path: Path, write_tone: WriteTone) -> None:
    """`metadata.jsonl` and `metadata.csv` with `file_name`, at any depth; rows without a file are reported."""
    for name in ("train/a.wav", "train/sub/b.wav", "test/c.wav", "d.wav"):
        write_tone(f"data/{name}", 0.2)
    data = tmp_path / "data"
    rows = [{"file_name": "a.wav", "text": "a flute"}, {"file_name": "sub/b.wav", "caption": "a harp", "mood": "calm"}]
    write_lines(data / "train" / "metadata.jsonl", *rows, {"file_name": "gone.wav", "text": "x"})
    (data / "test" / "metadata.csv").write_text('file_name,text,bpm\nc.wav,"a horn, loud",\n')
    report = load_items(data)
    described = {item.path.name: (item.caption, item.labels) for item in report.items}
    assert described == {
        "a.wav": ("a flute", {}),
        "b.wav": ("a harp", {"mood": "calm"}),
        "c.wav": ("a horn, loud", {"bpm": None}),
        "d.wav": (None, {}),
    }
    assert [(item.path.name, "no such file, described in" in item.reason) for item in report.rejected] == [
        ("gone.wav", True)
    ]
    (data / "test" / "metadata.csv").write_text("file_name,text\nc.wav\n")
    report = load_items(data)
    assert "line 2 must have 2 values" in report.rejected[0].reason and len(report.items) == 4


@pytest.mark.parametrize(
    "kind", ["json", "array in jsonl", "csv", "file_name", "NeMo", "file URL", "file URL of a folder"]
)
def test_other_manifests_are_read(tmp_path: Path, write_tone: WriteTone, kind: str) -> None:
    """JSON arrays, CSV tables, the names of fields of others, and file:// URLs."""
    clip = write_tone("data/a clip ö.wav", 0.2)
    row = {"audio": clip.name, "caption": "a flute", "bpm": 120}
    path = tmp_path / "data" / ("m.json" if kind == "json" else "m.csv" if kind == "csv" else "m.jsonl")
    source: str | Path = path
    if kind in ("json", "array in jsonl"):
        path.write_text("\n " + json.dumps([row], indent=1))
    elif kind == "csv":
        path.write_text(f"audio,caption,bpm\n{clip.name},a flute,120\n")
    else:
        name = {"file_name": "file_name", "NeMo": "audio_filepath"}.get(kind, "audio")
        value = clip.as_uri() if kind == "file URL" else clip.name
        write_lines(path, {name: value, "caption": "a flute", "bpm": 120})
    if kind == "file URL of a folder":
        source = path.as_uri()
    (item,) = load_items(source).items
    assert (item.path, item.caption) == (clip, "a flute")
    assert item.labels == {"bpm": "120" if kind == "csv" else 120}


BAD_MANIFESTS = {
    "address": ('{"audio": "https://example.com/a.wav"}', "line 1: https://example.com/a.wav is an address; download"),
    "array of texts": ('["a.wav"]', "entry 1 must be a JSON object, {...}, got str"),
    "broken array": ('[{"audio": "a.wav"}', "the text is not JSON"),
    "empty array": ("[]", "the manifest has no lines"),
    "no path": ('[{"caption": "x"}]', "entry 1: needs the field 'audio' (or 'file_name'), got ['caption']"),
    "number": ('{"file_name": 5}', "line 1: the field 'audio' must be a path, got 5"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifests_are_one_line(tmp_path: Path, case: str) -> None:
    """The place in the file and the reason."""
    text, message = BAD_MANIFESTS[case]
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_items(tmp_path / "m.jsonl")
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("place", ["manifest", "sidecar", "table", "captions", "list"])
def test_nan_means_missing(tmp_path: Path, write_tone: WriteTone, place: str) -> None:
    """pandas writes NaN for a missing caption or label."""
    write_tone("a.wav", 0.2)
    source: Path = tmp_path
    if place == "sidecar":
        (tmp_path / "a.json").write_text('{"caption": NaN, "bpm": NaN}')
    elif place == "table":
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "caption": NaN, "bpm": -Infinity}')
    else:
        value = {"manifest": '"caption": NaN', "captions": '"captions": [NaN, null]', "list": '"caption": [NaN]'}[place]
        source = tmp_path / "m.jsonl"
        source.write_text(f'{{"audio": "a.wav", {value}, "bpm": NaN}}')
    (item,) = load_items(source).items
    assert item.caption is None and captions_of(item) == [] and item.labels.get("bpm") is None
    manifest_text([item], tmp_path)


# lists of sources


def test_a_list_of_folders_is_one_data_set(
    tmp_path: Path, write_tone: WriteTone, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of several folders and manifests; a file in two of them is used once, and never held out as well."""
    for name in ("a/1.wav", "a/2.wav", "b/1.wav", "b/2.wav", "a/sub/3.wav"):
        write_tone(name, 0.2)
    sources = [tmp_path / "a", str(tmp_path / "b")]
    assert names_of(load_items(sources).items, tmp_path) == ["a/1.wav", "a/2.wav", "a/sub/3.wav", "b/1.wav", "b/2.wav"]
    train, valid = load_split(sources)
    assert len(train) + len(valid) == 5 and {item.path for item in train}.isdisjoint(item.path for item in valid)
    with caplog.at_level(logging.WARNING):
        train, valid = load_split([tmp_path / "a", tmp_path / "a" / "sub", tmp_path / "b"])
    assert len(train) + len(valid) == 5 and "1 files are in several data sources" in caplog.text
    for wrong in ([], ()):
        with pytest.raises(ValueError, match="empty list"):
            training_items(wrong, None)


class Waves(Dataset):
    """Four tones of half a second, with captions in every form."""

    captions: tuple[Any, ...] = ("a low tone", ["a tone", "another"], float("nan"), {"main": "a high tone"})

    def __init__(self, sample_hz: int | None = None, channels: int = 1) -> None:
        if sample_hz is not None:
            self.sample_hz = sample_hz
        self.channels = channels

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        time = torch.arange(8000) / 16000
        wave = 0.3 * torch.sin(2 * torch.pi * 220.0 * (index + 1) * time)
        return wave.expand(self.channels, -1) if self.channels > 1 else wave, self.captions[index]


def test_a_torch_data_set_becomes_items() -> None:
    """Captions in every form, one item per example, and the same crops as from files."""
    items = load_items(Waves(16000)).items
    assert [item.path.name for item in items] == [f"Waves[{index}]" for index in range(4)]
    assert [captions_of(item) for item in items] == [["a low tone"], ["a tone", "another"], [], ["a high tone"]]
    assert all((item.sample_hz, item.num_samples, item.channels) == (16000, 8000, 1) for item in items)
    assert items == load_items(Waves(), sample_hz=16000).items == load_items(Waves(np.int64(16000))).items
    assert items_digest(items) != items_digest(items[:3]) != items_digest([*items[:2], items[3]])


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_crops_of_a_data_set_equal_crops_of_files(tmp_path: Path, cache_bytes: int) -> None:
    """Reading a part of a wave, at its own rate and resampled."""
    for index in range(4):
        soundfile.write(tmp_path / f"{index}.wav", Waves()[index][0].numpy(), 16000, subtype="FLOAT")
    of_files, of_waves = (
        CropDataset(load_items(source).items, 0.2, [16000, 24000], cache_bytes=cache_bytes)
        for source in (tmp_path, Waves(16000))
    )
    for epoch in range(3):
        for index in range(4):
            left, right = of_files.get(epoch, index), of_waves.get(epoch, index)
            assert left.start_seconds == right.start_seconds
            for hz in (16000, 24000):
                assert torch.allclose(left.waves[hz], right.waves[hz], atol=1e-6)


def test_bad_examples_are_left_out_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Integers, NaN, empty waves, too many channels, unknown rates and wrong captions."""

    class Bad(Waves):
        captions = ("a", "b", "c", "d")

        def __getitem__(self, index: int) -> Any:
            wrong = [torch.zeros(10, dtype=torch.int16), torch.tensor([torch.nan]), np.zeros(10)]
            return super().__getitem__(index) if index == 3 else (wrong[index], "caption")

    report = load_items(Bad(16000))
    assert [item.path.name for item in report.items] == ["Bad[3]"]
    assert [item.path.name for item in report.rejected] == ["Bad[0]", "Bad[1]", "Bad[2]"]
    assert "float tensor" in report.rejected[0].reason and "torch.Tensor" in report.rejected[2].reason
    with pytest.raises(ValueError, match="none of 4 .*sample rate is not known"):
        load_items(Waves())
    with pytest.raises(ValueError, match="sample_hz must be in 1000..768000"):
        load_items(Waves(), sample_hz=10**9)
    with pytest.raises(ValueError, match="none of 4 .*has 3 channels, 1 or 2"):
        load_items(Waves(16000, channels=3), channels=2)

    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            yield torch.zeros(10)

    with pytest.raises(TypeError, match="Endless has no length"):
        dataset_items(Endless(), 16000)


def test_examples_that_fail_are_left_out_with_the_reason() -> None:
    """Errors of any kind in the code of the data set, transposed waves, and rates that are no whole number."""
    wave = torch.zeros(8000)
    wrong: list[Any] = [RuntimeError("decoder"), KeyError("x"), OSError("gone"), torch.zeros(8000, 2), (wave, 0.5)]

    class Failing(Waves):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            if index == 5:
                return wave, 16000.0, "a rate as a float"
            if isinstance(wrong[index], Exception):
                raise wrong[index]
            return wrong[index]

    report = load_items(Failing(16000))
    assert [(item.path.name, item.caption) for item in report.items] == [("Failing[5]", "a rate as a float")]
    reasons = [
        "RuntimeError: decoder",
        "KeyError: 'x'",
        "OSError: gone",
        "wave.transpose(0, 1)",
        "whole number, got 0.5",
    ]
    assert [reason in item.reason for reason, item in zip(reasons, report.rejected, strict=True)] == [True] * 5


def test_captions_and_labels_are_part_of_the_identity() -> None:
    """For a training that reads them; the identity for waves alone stays."""
    items = load_items(Waves(16000)).items
    for change in ({"caption": "other"}, {"labels": {"hard_negatives": ["a drum"]}}):
        changed = [replace(items[0], **change), *items[1:]]
        assert items_digest(changed) != items_digest(items)
        assert items_digest(changed, waves_only=True) == items_digest(items, waves_only=True)


def test_captions_and_labels_are_formatted_once() -> None:
    """Every trainer of a pipeline asks for the digest of the same items, which may be many thousands."""

    class Counted:
        count = 0

        def __repr__(self) -> str:
            Counted.count += 1
            return "counted"

    items = [AudioItem(Path("a.wav"), "a drum", {"label": Counted()}, 16000, 8000, digest="8:00")]
    assert len({items_digest(items) for _ in range(3)}) == 1 and Counted.count == 1
    assert items_digest([replace(items[0])]) == items_digest(items) and Counted.count == 2


def test_a_data_set_that_changes_is_named() -> None:
    """An example that is shorter when it is read again."""

    class Shrinking(Waves):
        asked = 0

        def __getitem__(self, index: int) -> Any:
            self.asked += 1
            wave, caption = super().__getitem__(index)
            return wave[: 8000 if self.asked <= 4 else 100], caption

    data = CropDataset(load_items(Shrinking(16000)).items, None, [16000])
    with pytest.raises(ValueError, match=r"Shrinking\[0\]: has 100 samples .* but 8000 samples when it was listed"):
        data.get(0, 0)


@pytest.mark.parametrize(
    "source",
    [
        "data set",
        pytest.param("folders", marks=pytest.mark.slow),
        pytest.param("two data sets", marks=pytest.mark.slow),
        pytest.param("folder argument", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("trainer", ["codec", "semantic", "best_rq", "mulan", "kmeans"])
def test_every_trainer_takes_data_sets_and_lists_of_folders(
    tmp_path: Path, write_tone: WriteTone, trainer: str, source: str
) -> None:
    """One mechanism serves all trainers."""
    from audiolm_pytorch.codecs.training.trainer import SoundStreamTrainer
    from audiolm_pytorch.lm.stages import SemanticTransformer
    from audiolm_pytorch.lm.trainers import SemanticTransformerTrainer
    from audiolm_pytorch.semantic import KMeansTokenizer, KMeansTrainer
    from audiolm_pytorch.semantic.best_rq.model import BestRQEncoder
    from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer
    from musiclm_pytorch.mulan.trainer import MuLaNTrainer
    from tests.audiolm_pytorch.audio.test_waves import codec
    from tests.helpers.fakes import SIZES
    from tests.helpers.tiny_mulan import tiny_mulan

    for number in range(4):
        (write_tone(f"{'ab'[number % 2]}/{number}.wav", 0.5, 16000).with_suffix(".txt")).write_text(f"tone {number}")
    data: dict[str, Any] = {
        "data set": {"items": Waves(16000)},
        "two data sets": {"items": (Waves(16000), Waves(16000))},
        "folders": {"folder": [tmp_path / "a", tmp_path / "b"]},
        "folder argument": {"folder": Waves(16000)},
    }[source]
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, dim_head=16, sample_hz=8000, num_mels=20, n_fft=256)
    encoder = BestRQEncoder(**sizes, hop_length=40)
    loop: dict[str, Any] = dict(batch_size=2, num_train_steps=1, results_folder=tmp_path / "run", **data)
    if trainer == "codec":
        job: Any = SoundStreamTrainer(codec(), data_max_length=1600, **loop)
    elif trainer == "best_rq":
        job = SemanticTokenizerTrainer(encoder=encoder, seconds=0.4, **loop)
    elif trainer == "mulan":
        job = MuLaNTrainer(mulan=tiny_mulan(), seconds=0.4, **loop)
    elif trainer == "kmeans":
        if source == "two data sets":
            data = {"items": Waves(16000)}
        options: dict[str, Any] = dict(layer=1, num_clusters=4, seconds=0.4, results_folder=tmp_path / "run", **data)
        job = KMeansTrainer(encoder=encoder, **options)
        assert job.num_tokens > 4
        return
    else:
        tokenizer = KMeansTokenizer(encoder=encoder.eval(), layer=1, centroids=torch.randn(8, 32))
        rate_hz = tokenizer.target_sample_hz // tokenizer.downsample_factor
        stage = SemanticTransformer(num_semantic_tokens=8, rate_hz=rate_hz, **SIZES)
        job = SemanticTransformerTrainer(transformer=stage, wav2vec=tokenizer, data_max_length=3200, **loop)
    assert job.train().step == 1


def test_a_pipeline_tests_the_channels_of_its_codec(tmp_path: Path, write_tone: WriteTone) -> None:
    """A surround file would stop the step of the tokens, hours after the start."""
    from musiclm_pytorch.pipeline.pipeline import Pipeline
    from tests.audiolm_pytorch.audio.test_waves import codec
    from tests.helpers.micro import MICRO

    for name, channels in (("a", 2), ("b", 1), ("c", 6)):
        write_tone(f"data/{name}.wav", 1.2, 16000, channels=channels)
    mono = Pipeline(MICRO, data=tmp_path / "data", out=tmp_path / "out")
    assert {item.path.stem for items in mono.items for item in items} == {"a", "b", "c"}
    stereo = Pipeline(MICRO, data=tmp_path / "data", out=tmp_path / "out", pretrained={"codec": codec(2, levels=3)})
    assert {item.path.stem for items in stereo.items for item in items} == {"a", "b"}
