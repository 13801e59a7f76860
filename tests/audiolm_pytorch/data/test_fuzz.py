"""Mutated audio files, manifests, tables and token shards: results, or errors of one line, in bounded time."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audiolm_pytorch.audio.files import decoded_info, read_audio
from audiolm_pytorch.audio.stream import AudioSource
from audiolm_pytorch.data import TokenShards, load_items, load_split, write_shards
from musiclm_pytorch.mulan.musiccaps import read_musiccaps
from tests.helpers.mutations import TEXTS, mutated, outcome

pytestmark = pytest.mark.slow


def streamed_samples(path: Path) -> int:
    """Number of samples of the blocks of a file."""
    return sum(block.shape[1] for block in AudioSource(path, 16000))


def test_500_mutated_audio_files(tmp_path: Path) -> None:
    """Headers that claim other rates, lengths and channels, cut and overwritten data."""
    wave = np.random.default_rng(0).uniform(-0.3, 0.3, (6000, 2))
    formats = {"wav": {}, "flac": {}, "mp3": {}, "ogg": {}, "aiff": {}, "au": {}, "caf": {}, "w64": {}}
    kinds: dict[str, dict[str, str]] = {**formats, "opus": {"format": "OGG", "subtype": "OPUS"}}
    kinds["float.wav"] = {"subtype": "FLOAT"}
    originals = []
    for suffix, options in kinds.items():
        soundfile.write(tmp_path / f"x.{suffix}", wave, 24000, **options)
        originals.append((suffix, (tmp_path / f"x.{suffix}").read_bytes()))
    rng, num_read = random.Random(0), 0
    for number in range(500):
        suffix, data = originals[number % len(originals)]
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(mutated(data, rng, [b"\xff" * 8, b"\0" * 8, b"RIFF", b"ID3\x04\0\0\x7f\x7f\x7f\x7f"]))
        info = outcome(decoded_info, path)
        read = outcome(read_audio, path, 16000, 1, 0.01)
        blocks = outcome(streamed_samples, path)
        if not isinstance(info, ValueError):
            assert 1000 <= info.sample_hz <= 768_000 and info.num_samples >= 1
            assert not isinstance(blocks, ValueError)
            num_read += 1
        if not isinstance(read, ValueError):
            assert read[0].abs().max() <= 100
        path.unlink()
    assert 50 < num_read < 450


def test_300_mutated_manifests_and_tables(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """JSON lines, JSON arrays, CSV tables, files beside clips, tables of Hugging Face, and the table of MusicCaps."""
    write_tone("data/a.wav", 0.05)
    write_tone("data/b.wav", 0.05)
    rows = [{"audio": "a.wav", "caption": "a flute", "bpm": 120}, {"audio": "b.wav", "captions": ["x", "y ö"]}]
    table = "ytid,start_s,end_s,aspect_list,caption,is_balanced_subset\n"
    table += "-0Gj8-vB1q4,30,40,\"['slow', 'children''s song']\",A song.,True\n"
    originals = {
        "m.jsonl": "\n".join(json.dumps(row) for row in rows),
        "m.json": json.dumps(rows),
        "m.csv": "audio,caption\na.wav,a flute\nb.wav,\n",
        "metadata.jsonl": '{"file_name": "a.wav", "text": "a flute"}',
        "metadata.csv": "file_name,text\na.wav,a flute\n",
        "a.json": json.dumps({"caption": "a", "mood": "calm"}),
        "a.txt": "a flute\na harp",
        "table.csv": table,
    }
    rng = random.Random(1)
    num_results = 0
    for number in range(300):
        name, text = list(originals.items())[number % len(originals)]
        path = tmp_path / "data" / name
        path.write_bytes(mutated(text.encode(), rng, TEXTS))
        if name == "table.csv":
            result = outcome(read_musiccaps, path)
        elif name.startswith("m."):
            result = outcome(load_items, path)
        else:
            result = outcome(load_split, tmp_path / "data")
            assert not isinstance(result, ValueError)  # the clips are used without the damaged file
        num_results += not isinstance(result, ValueError)
        path.unlink()
    assert 100 < num_results < 290


def test_200_damaged_token_shards(tmp_path: Path) -> None:
    """A change in any file of the folder raises an error, or changes no record."""

    def make_record(number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(number)
        return {"codes": rng.integers(0, 40_000, (number + 1, 2)), "x": rng.standard_normal(3), "n": np.asarray(number)}

    def records(folder: Path) -> Any:
        shards = TokenShards(folder, {"kind": "toy"})
        longest = [shards.longest(name) for name in shards.fields]
        values = [{name: value.tolist() for name, value in shards[index].items()} for index in range(len(shards))]
        return longest, [sorted(record.items()) for record in values]

    write_shards(tmp_path / "s", make_record, 10, {"kind": "toy"}, records_per_chunk=4)
    files = sorted(path.relative_to(tmp_path / "s") for path in (tmp_path / "s").rglob("*") if path.is_file())
    expected, rng, num_errors = str(records(tmp_path / "s")), random.Random(2), 0
    for number in range(200):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "s", folder)
        path = folder / files[number % len(files)]
        data = path.read_bytes()
        if number % 3 == 0:  # one bit
            place = rng.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
        elif number % 10 == 1:
            path.unlink()
        else:
            path.write_bytes(mutated(data, rng, [*TEXTS, b"\0" * 64]))
        changed = not path.is_file() or path.read_bytes() != data
        result = outcome(records, folder)
        is_error = isinstance(result, ValueError)
        assert is_error or str(result) == expected
        assert is_error or not changed or path.name == "plan.json", path
        num_errors += is_error
        shutil.rmtree(folder)
    assert num_errors > 150
