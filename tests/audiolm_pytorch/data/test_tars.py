"""Tar archives (WebDataset) and data sets of the package datasets as sources of training data."""

import io
import json
import logging
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.data import CropDataset, items_digest, load_items, load_split, write_tars
from audiolm_pytorch.data.manifest import captions_of
from audiolm_pytorch.lm.trainers import SemanticTransformerTrainer
from tests.helpers import fakes
from tests.helpers.toy_training import rows_of, tensors_in

HZ = 16000
FORMATS = {"wav": ("WAV", None), "flac": ("FLAC", None), "mp3": ("MP3", None), "ogg": ("OGG", None)}
FORMATS |= {"opus": ("OGG", "OPUS")}


def encoded(seed: int, suffix: str = "flac", num_samples: int = HZ) -> bytes:
    """Encoded noise."""
    data = io.BytesIO()
    name, subtype = FORMATS[suffix]
    wave = np.random.default_rng(seed).uniform(-0.3, 0.3, num_samples)
    soundfile.write(data, wave, HZ, format=name, subtype=subtype)
    return data.getvalue()


def write_members(path: Path, members: dict[str, bytes]) -> Path:
    """Write an archive with tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_archives_of_webdataset_are_read_like_the_same_files(tmp_path: Path) -> None:
    """Written by webdataset, read by us: names, captions, contents and crops are those of the unpacked files."""
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "tars").mkdir()
    (tmp_path / "files").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for number, suffix in enumerate(FORMATS):
            sample: dict[str, Any] = {"__key__": f"clip{number}", suffix: encoded(number, suffix)}
            sample["json" if number % 2 else "txt"] = (
                {"caption": f"c {number}", "bpm": 90} if number % 2 else f"c {number}"
            )
            writer.write(sample)
    assert len(list((tmp_path / "tars").iterdir())) == 2
    urls = sorted(str(path) for path in (tmp_path / "tars").iterdir())
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        for suffix in sample.keys() - {"__key__", "__url__", "__local_path__"}:
            (tmp_path / "files" / f"{sample['__key__']}.{suffix}").write_bytes(sample[suffix])
    packed, unpacked = load_items(tmp_path / "tars").items, load_items(tmp_path / "files").items
    assert [item.path.relative_to(tmp_path / "tars").as_posix() for item in packed][::4] == [
        "000.tar/clip0.wav",
        "001.tar/clip4.opus",
    ]
    assert items_digest(packed) == items_digest(unpacked)
    assert [item.text_facts for item in packed] == [item.text_facts for item in unpacked]
    assert packed[1].caption == "c 1" and packed[1].labels == {"bpm": 90}
    crops = [CropDataset(items, 0.5, [8000, HZ], cache_bytes=0) for items in (packed, unpacked)]
    for epoch, index in [(0, 4), (0, 0), (1, 2), (0, 1), (2, 3), (1, 2)]:
        ours, files = (dataset.get(epoch, index).waves for dataset in crops)
        assert all(torch.equal(ours[hz], files[hz]) for hz in (8000, HZ))
    train, valid = load_split(tmp_path / "tars", 0.4)
    assert {item.path.name for item in valid} == {item.path.name for item in load_split(tmp_path / "files", 0.4)[1]}
    assert len(train) + len(valid) == 5


def test_broken_members_are_listed_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever cannot be used is named with its reason, and everything else is used."""
    archive = write_members(
        tmp_path / "a.tar",
        {
            "dir/good.flac": encoded(0),
            "dir/good.txt": b"first\nsecond",
            "take.1.wav": encoded(1, "wav"),
            "take.2.wav": encoded(2, "wav"),
            "take.2.txt": b"of the second take",
            "take.json": b'{"caption": "of both"}',
            "empty.wav": b"",
            "page.mp3": b"<html>not found</html>",
            "cut.flac": encoded(3)[:4000],
            "x.m4a": b"\0" * 100,
            "bad.json": b"{",
            "bad.flac": encoded(4),
            "lonely.txt": b"a caption",
            "../outside.wav": encoded(5),
            "dir/good.flac ": b"picture",
            "._good.flac": b"resource fork",
            ".hidden/a.wav": encoded(6),
            "cover.jpg": b"picture",
        },
    )
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        again = tarfile.TarInfo("dir/good.flac")
        again.size = 4
        tar.addfile(again, io.BytesIO(b"abcd"))
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "c.tar").write_bytes(b"not a tar archive" * 100)
    with caplog.at_level(logging.WARNING):
        report = load_items(tmp_path)
    names = ["dir/good.flac", "take.1.wav", "take.2.wav", "bad.flac"]
    assert [item.path.relative_to(archive).as_posix() for item in report.items] == names
    assert [captions_of(item) for item in report.items] == [
        ["first", "second"],
        ["of both"],
        ["of the second take", "of both"],
        [],
    ]
    reasons = {str(item.path.relative_to(tmp_path)): item.reason for item in report.rejected}
    assert len(reasons) == len(report.rejected) == 11
    assert "empty" in reasons["a.tar/empty.wav"] and "web page" in reasons["a.tar/page.mp3"]
    assert "a.tar/cut.flac" in reasons and "convert" in reasons["a.tar/x.m4a"]
    assert "outside" in reasons["a.tar/outside.wav"] and "no audio member" in reasons["a.tar/lonely.txt"]
    assert "not a regular file" in reasons["a.tar/link.wav"] and "twice" in reasons["a.tar/dir/good.flac"]
    assert "not JSON" in reasons["a.tar/bad.json"] and "used without it" in reasons["a.tar/bad.json"]
    assert "decompress" in reasons["b.tar.gz"] and "cannot be read to its end" in reasons["c.tar"]
    assert all(caplog.text.count(f"{name} (") == 1 for name in reasons)


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "damaged header", "no end"])
def test_members_before_the_damage_of_an_archive_are_used(damage: str, tmp_path: Path) -> None:
    """A download that ended early, or a changed header in the middle, is reported; tarfile alone ends silently."""
    path = write_members(tmp_path / "a.tar", {f"{number}.flac": encoded(number) for number in range(4)})
    with tarfile.open(path) as tar:
        third = tar.getmember("2.flac")
    data = path.read_bytes()
    if damage == "damaged header":
        path.write_bytes(data[: third.offset] + b"\xff" * 512 + data[third.offset + 512 :])
    elif damage == "no end":  # as written by cat a.tar b.tar without their last blocks
        path.write_bytes(data[: -(-len(data.rstrip(b"\0")) // 512) * 512])
    else:
        path.write_bytes(data[: third.offset + (300 if damage == "cut in a header" else 2000)])
    report = load_items(path)
    assert [item.path.name for item in report.items][:2] == ["0.flac", "1.flac"]
    if damage == "no end":
        assert len(report.items) == 4 and not report.rejected
    else:
        assert len(report.items) == 2 and [item.path for item in report.rejected] == [path]


def test_a_replaced_archive_is_named(tmp_path: Path) -> None:
    """Positions of members are those of the archive that was listed."""
    path = write_members(tmp_path / "a.tar", {"0.flac": encoded(0), "1.flac": encoded(1)})
    items = load_items(path).items
    write_members(path, {"1.flac": encoded(1, num_samples=2 * HZ), "0.flac": encoded(0)})
    with pytest.raises(ValueError, match=r"a.tar: has \d+ bytes, but \d+ bytes when it was listed; restore it"):
        items[0].read(HZ)
    with pytest.raises(ValueError, match="has no audio files"):
        load_items(write_members(tmp_path / "b.tar", {"a.txt": b"text"}))
    with pytest.raises(ValueError, match="does not exist"):
        load_items(tmp_path / "none.tar")


@pytest.mark.slow
def test_a_run_continues_after_its_files_were_packed(tmp_path: Path, low_rates: None) -> None:
    """A trainer on an archive, killed and continued with workers, ends at the bits of one on the unpacked files."""
    members = {f"{number}.flac": encoded(number) for number in range(6)}
    write_members(tmp_path / "tars" / "a.tar", members)
    (tmp_path / "files").mkdir()
    for name, data in members.items():
        (tmp_path / "files" / name).write_bytes(data)

    def trainer(folder: Path, results: str, **settings: Any) -> Any:
        torch.manual_seed(0)
        return SemanticTransformerTrainer(
            transformer=fakes.tiny_stages()["semantic"],
            wav2vec=fakes.FakeSemanticTokenizer(),
            folder=folder,
            data_max_length_seconds=0.5,
            num_train_steps=6,
            batch_size=2,
            ema_decay=0.9,
            results_folder=tmp_path / results,
            **settings,
        )

    trainer(tmp_path / "files", "straight").train()
    trainer(tmp_path / "files", "run").train(stop_after_steps=2)
    trainer(tmp_path / "tars", "run", num_workers=2).train(stop_after_steps=2)
    trainer(tmp_path / "tars", "run").train()
    runs = [tmp_path / "straight", tmp_path / "run"]
    checkpoints = [tensors_in(run / "checkpoint") for run in runs]
    assert len(checkpoints[0]) == 3 and checkpoints[0] == checkpoints[1] and rows_of(runs[0]) == rows_of(runs[1])


# data sets of the package datasets


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[..., Any]:
    """A data set with audio in bytes, in files and missing, captions and class labels."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def make(num_rows: int = 7, **columns: list[Any]) -> Any:
        (tmp_path / "file.wav").write_bytes(encoded(99, "wav"))
        sounds: list[Any] = [{"bytes": encoded(number), "path": f"clip{number}.flac"} for number in range(num_rows)]
        sounds[1:4] = [
            {"bytes": None, "path": str(tmp_path / "file.wav")},
            {"bytes": encoded(9, "mp3"), "path": None},
            None,
        ]
        texts = [f"caption {number}" for number in range(num_rows)]
        kinds = [number % 2 for number in range(num_rows)]
        rows = datasets.Dataset.from_dict({"audio": sounds, "text": texts, "kind": kinds, **columns})
        rows = rows.cast_column("kind", datasets.ClassLabel(names=["drum", "horn"]))
        return rows.cast_column("audio", datasets.Audio(sampling_rate=HZ))

    return make


@pytest.mark.slow  # importing datasets
def test_rows_of_datasets_become_items(make_rows: Callable[..., Any], tmp_path: Path) -> None:
    """Bytes and files are decoded by soundfile, at random positions, and a row without audio is named."""
    report = load_items(make_rows())
    names = ["Dataset[0]/clip0.flac", str(tmp_path / "file.wav"), "Dataset[2]", "Dataset[4]/clip4.flac"]
    assert [str(item.path) for item in report.items[:4]] == names
    assert [(str(item.path), item.reason) for item in report.rejected] == [
        ("Dataset[3]", "the file is empty (0 bytes)")
    ]
    first = report.items[0]
    assert first.caption == "caption 0" and first.labels == {"kind": "drum"}
    whole = torch.from_numpy(soundfile.read(io.BytesIO(encoded(0)), dtype="float32")[0])
    assert torch.equal(first.read(HZ, start_seconds=0.25, duration_seconds=0.5)[0], whole[4000:12000])
    train, valid = load_split([make_rows(), tmp_path], 0.3)
    assert len(train) + len(valid) == 6  # the file is in both sources


@pytest.mark.slow
def test_data_sets_without_one_audio_column_are_refused(make_rows: Callable[..., Any]) -> None:
    """The message names the column types, and how a stream is stored."""
    rows = make_rows()
    with pytest.raises(ValueError, match=r"must have one column of the type Audio, got \[\] of \['text', 'kind'\]"):
        load_items(rows.remove_columns("audio"))
    with pytest.raises(
        TypeError, match=r"store it once with folder = audiolm_pytorch.data.write_tars\(dataset, FOLDER\)"
    ):
        load_items(rows.to_iterable_dataset())


@pytest.mark.slow
def test_a_stream_is_stored_once_and_continued(make_rows: Callable[..., Any], tmp_path: Path) -> None:
    """Bytes of an interrupted and continued call are those of a straight one; a complete folder reads nothing."""
    rows = make_rows(11)
    straight = write_tars(rows.to_iterable_dataset(num_shards=3), tmp_path / "straight", rows_per_tar=4)
    report = load_items(straight)
    names = ["000000000.flac", "000000001.wav", "000000002.mp3", "000000004.flac"]
    assert [item.path.name for item in report.items][:4] == names
    assert [item.path.name for item in report.rejected] == ["000000003.wav"]
    assert report.items[1].caption == "caption 1" and report.items[1].labels == {"kind": "horn"}

    class Interrupted(Exception):
        pass

    def failing(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index in fail_at:
            raise Interrupted
        return row

    fail_at = {6}
    undecoded = rows.cast_column("audio", sys.modules["datasets"].Audio(decode=False))
    stream = undecoded.to_iterable_dataset(num_shards=3).map(failing, with_indices=True, features=undecoded.features)
    for place in ({6}, {9}, set()):
        fail_at.clear()
        fail_at |= place
        try:
            write_tars(stream, tmp_path / "again", rows_per_tar=4)
        except Interrupted:
            (tmp_path / "again" / ".000001.tar.99.partial").touch()  # as after a kill
    again = tmp_path / "again"
    assert not list(again.glob(".*.partial"))
    names = ["000000.tar", "000001.tar", "000002.tar"]
    assert sorted(path.name for path in again.iterdir() if path.suffix == ".tar") == names
    assert all((again / name).read_bytes() == (straight / name).read_bytes() for name in names)
    fail_at |= set(range(20))
    assert write_tars(stream, again, rows_per_tar=4) == again
    with pytest.raises(ValueError, match="contains rows of another data set; use another folder: rows_per_tar"):
        write_tars(stream, again, rows_per_tar=5)
    with pytest.raises(ValueError, match=r"pass it without shuffle\(\)"):
        write_tars(rows.to_iterable_dataset().shuffle(buffer_size=5), tmp_path / "shuffled")
    with pytest.raises(ValueError, match="row 0: JSON cannot store its columns"):
        write_tars(make_rows(blob=[b"1"] * 7), tmp_path / "blob")
    assert json.loads((straight / ".stream.json").read_text())["num_rows"] == 11
