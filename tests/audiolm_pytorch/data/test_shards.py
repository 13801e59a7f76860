"""Token shards: what is written is what is read, nothing is computed twice, and nothing is mixed up."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.saving.files import digest_of_file, read_json, write_json
from tests.helpers.full_disk import full_disk

FINGERPRINT = {"codec": "ab12", "semantic": {"name": "w2v", "layer": 7}, "rates_hz": (16000, 24000)}


def make_record(number: int) -> dict[str, np.ndarray]:
    """A record whose length depends on its number; record 5 has no frames."""
    rng = np.random.default_rng(number)
    frames = 0 if number == 5 else 3 + number % 4
    return {
        "semantic": rng.integers(0, 512, frames),
        "acoustic": rng.integers(0, 1024, (2 * frames, 4)),
        "latents": rng.standard_normal((frames, 8)).astype(np.float16),
        "duration_seconds": np.array(0.1 + number),
    }


class Counting:
    """`make_record` that stores its arguments, and may fail once at a record."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fail_at = fail_at

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        self.asked.append(number)
        if number == self.fail_at:
            raise KeyboardInterrupt
        return make_record(number)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Whether two records hold the same values."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Guards values, shapes, small types, numbers, empty records and the fingerprint."""
    assert write_shards(tmp_path / "s", make_record, 11, FINGERPRINT, records_per_chunk=4) == 3
    shards = TokenShards(tmp_path / "s", FINGERPRINT)
    assert len(shards) == 11 and shards.fields == ("semantic", "acoustic", "latents", "duration_seconds")
    assert all(same(shards[number], make_record(number)) for number in [10, 0, 5, 3, 4, *range(11)])
    record = shards[0]
    kinds = {name: array.dtype.name for name, array in record.items()}
    assert kinds == {"semantic": "int16", "acoustic": "int16", "latents": "float16", "duration_seconds": "float64"}
    assert record["duration_seconds"].shape == () and shards[5]["acoustic"].shape == (0, 4)
    assert shards.fingerprint["semantic"]["layer"] == 7
    with pytest.raises(IndexError, match="record 11 is out of range"):
        shards[11]


def test_a_field_has_one_type_whatever_the_chunk(tmp_path: Path) -> None:
    """Guards readers from codes that are int16 in one chunk and int32 in the next; big floats become float32."""

    def record(number: int) -> dict[str, np.ndarray]:
        return {"codes": np.array([number * 20000]), "x": np.ones((1, 2)), "flag": np.array([True])}

    write_shards(tmp_path / "s", record, 4, {}, records_per_chunk=1)
    shards = TokenShards(tmp_path / "s")
    assert [shards[number]["codes"].tolist() for number in range(4)] == [[0], [20000], [40000], [60000]]
    assert {shards[number]["codes"].dtype for number in range(4)} == {np.dtype(np.int32)}
    assert shards[0]["x"].dtype == np.float32 and shards[0]["flag"].tolist() == [1]


def test_a_killed_writer_goes_on_where_it_stood(tmp_path: Path) -> None:
    """Guards hours of encoding: complete chunks are kept, the broken one is done again, a finished folder is left."""
    folder, killed, resumed, idle = tmp_path / "s", Counting(fail_at=6), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, killed, 10, FINGERPRINT, records_per_chunk=4)
    with pytest.raises(ValueError, match=r"no index.json \(unfinished: run write_shards again\)"):
        TokenShards(folder)
    assert write_shards(folder, resumed, 10, FINGERPRINT, records_per_chunk=4) == 2
    assert resumed.asked == [4, 5, 6, 7, 8, 9]
    assert write_shards(folder, idle, 10, FINGERPRINT, records_per_chunk=4) == 0 and idle.asked == []
    shards = TokenShards(folder, FINGERPRINT)
    assert all(same(shards[number], make_record(number)) for number in range(10))


def test_what_a_kill_during_writing_leaves_is_not_taken_for_a_chunk(tmp_path: Path) -> None:
    """Guards against a chunk of half a file: only a renamed folder is a chunk."""
    folder = tmp_path / "s"
    half = folder / ".chunk-00000.999999.partial"
    half.mkdir(parents=True)
    (half / "semantic.npy").write_bytes(b"\x93NUMPY half")
    write_shards(folder, make_record, 4, FINGERPRINT, records_per_chunk=2)
    assert same(TokenShards(folder)[0], make_record(0))


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """Guards parallel encoding: each chunk once, and the index only when all are there."""
    folder, worker, (reader, writer) = tmp_path / "s", Counting(), os.pipe()

    def held(number: int) -> dict[str, np.ndarray]:
        """The other process computes the first chunk until this process writes to the pipe."""
        (folder / "begun").touch()
        os.read(reader, 1)
        return make_record(number)

    folder.mkdir()
    other = os.fork()
    if other == 0:
        os.close(writer)  # the process ends if the test fails
        try:
            os._exit(write_shards(folder, held, 10, FINGERPRINT, records_per_chunk=2) - 1)
        finally:
            os._exit(9)
    while not (folder / "begun").exists():
        time.sleep(0.01)

    def waiting() -> None:
        assert worker.asked == list(range(2, 10)) and not (folder / "index.json").exists()
        os.write(writer, b"12")

    assert write_shards(folder, worker, 10, FINGERPRINT, records_per_chunk=2, while_waiting=waiting) == 4
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    assert all(same(TokenShards(folder)[number], make_record(number)) for number in range(10))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_chunk_of_a_killed_process_is_computed_by_another_one(tmp_path: Path) -> None:
    """Guards locks that outlive their process, and its unfinished files."""

    def killed(number: int) -> dict[str, np.ndarray]:
        (tmp_path / f".chunk-00000.{os.getpid()}.partial").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    other = os.fork()
    if other == 0:
        write_shards(tmp_path, killed, 4, FINGERPRINT, records_per_chunk=2)
    os.waitpid(other, 0)
    assert [path.name for path in tmp_path.glob("*.partial")]
    assert write_shards(tmp_path, make_record, 4, FINGERPRINT, records_per_chunk=2) == 2
    assert not list(tmp_path.glob(".*"))


def test_tokens_of_another_encoder_are_refused_with_the_difference(tmp_path: Path) -> None:
    """Guards against training on, or adding to, tokens of another model; the message lists the differences."""
    write_shards(tmp_path / "s", make_record, 4, FINGERPRINT, records_per_chunk=2)
    other = {**FINGERPRINT, "semantic": {"name": "w2v", "layer": 9}, "crop": 1.0}
    difference = r"crop: found nothing, expected .*; semantic\.layer: found 7, expected 9"
    with pytest.raises(ValueError, match=f"tokens of another origin; write them again: {difference}$"):
        TokenShards(tmp_path / "s", other)
    difference = r"fingerprint\.crop: found nothing, expected .*; fingerprint\.semantic\.layer: found 7, expected 9"
    with pytest.raises(ValueError, match=f"contains records of other arguments; use another folder.*: {difference}$"):
        write_shards(tmp_path / "s", make_record, 4, other, records_per_chunk=2)
    with pytest.raises(ValueError, match="num_records: found 4, expected 5"):
        write_shards(tmp_path / "s", make_record, 5, FINGERPRINT, records_per_chunk=2)
    TokenShards(tmp_path / "s", FINGERPRINT)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"a": np.array([np.nan])}, "record 1, field 'a' is not finite"),
        ({"a": np.array([2**40])}, "record 1, field 'a' has values .*, which int32 cannot store"),
        ({"a": np.array(["x"])}, "record 1, field 'a' is <U1"),
        (
            {"a": np.zeros((2, 3))},
            r"field 'a' of record 1 has shape \(2, 3\); it may differ from \(2,\)",
        ),
        ({"b": np.zeros(2)}, r"record 1 needs fields \['a'\] like record 0, got \['b'\]"),
    ],
)
def test_records_that_cannot_be_stored_are_named(tmp_path: Path, broken: dict[str, np.ndarray], message: str) -> None:
    """Guards the message for invalid records, and that no incomplete chunk is left."""
    records = [{"a": np.zeros(2)}, broken]
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "s", lambda number: records[number], 2, {})
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"plan.json", ".lock"}
    with pytest.raises(TypeError, match="record 0: make_record must return a dict of arrays, got None"):
        write_shards(tmp_path / "none", lambda number: None, 1, {})
    with full_disk(2000), pytest.raises(OSError, match=f"cannot write to {tmp_path / 'full'}: "):
        write_shards(tmp_path / "full", lambda number: {"a": np.zeros(10_000)}, 1, {})
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"plan.json", ".lock"}


def test_chunks_that_disagree_are_found_before_they_are_read(tmp_path: Path) -> None:
    """Guards against records whose fields change from chunk to chunk."""
    with pytest.raises(ValueError, match="chunk-00001 has other fields than .*: b: found .*, expected nothing"):
        write_shards(
            tmp_path / "s",
            lambda number: {"a": np.zeros(1)} if number == 0 else {"a": np.zeros(1), "b": np.zeros(1)},
            2,
            {},
            records_per_chunk=1,
        )


def test_an_index_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    """It may be the index of a website; the records are not computed first."""
    (tmp_path / "index.json").write_text("mine")
    with pytest.raises(ValueError, match=r"index.json exists, and was not written by this library"):
        write_shards(tmp_path, lambda number: {"a": np.zeros(2)}, 1, {})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index.json", "mine")]


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    """The shards are not damaged."""
    write_shards(tmp_path, lambda number: {"a": np.zeros(2)}, 1, {})
    with pytest.raises(ValueError, match=r"has no field 'b', it has \['a'\]"):
        TokenShards(tmp_path).longest("b")


def test_folders_that_are_no_shards_are_refused(tmp_path: Path) -> None:
    """Guards the wrong path, a future format and impossible numbers."""
    with pytest.raises(ValueError, match=r"no index.json \(not a shard folder\)"):
        TokenShards(tmp_path)
    write_shards(tmp_path / "s", make_record, 2, {})
    index = tmp_path / "s" / "index.json"
    write_json(index, read_json(index) | {"format_version": 9}, sealed=True)
    with pytest.raises(ValueError, match="format_version 9, but this release of the library reads 2"):
        TokenShards(tmp_path / "s")
    with pytest.raises(ValueError, match="num_records >= 1"):
        write_shards(tmp_path / "t", make_record, 0, {})


def test_many_chunks_do_not_keep_many_files_open(tmp_path: Path) -> None:
    """Guards the limit of open files on a large corpus."""
    write_shards(tmp_path / "s", lambda number: {"a": np.array([number])}, 8, {}, records_per_chunk=1)
    shards = TokenShards(tmp_path / "s", max_open_chunks=3)
    assert [shards[number]["a"].item() for number in [*range(8), 0]] == [*range(8), 0]
    assert sorted(shards._open) == [0, 6, 7]


def edit_index(folder: Path, **changes: Any) -> None:
    """Change entries of the index as an attacker does, with a correct digest."""
    write_json(folder / "index.json", read_json(folder / "index.json") | changes, sealed=True)


def forge_chunk(folder: Path, name: str, array: np.ndarray) -> None:
    """Replace an array of chunk 0, and correct all digests."""
    chunk = folder / "chunk-00000"
    np.save(chunk / name, array, allow_pickle=False)
    fields = read_json(chunk / "fields.json")
    field = fields[name.split(".")[0]]
    field["digests"] = [digest_of_file(chunk / f"{name.split('.')[0]}{end}") for end in (".npy", ".offsets.npy")]
    write_json(chunk / "fields.json", fields, sealed=True)
    edit_index(folder, chunks=[digest_of_file(chunk / "fields.json")])


@pytest.mark.parametrize(
    "offsets",
    [[0, 2, 10**12], [0, 3, 2], [1, 2, 3], [0, 2], [[0, 1, 2]], [0.0, 1.0, 2.0], [-5, 0, 2], [0, 1, 1]],
)
def test_wild_offsets_are_refused_also_with_correct_digests(tmp_path: Path, offsets: Any) -> None:
    """Offsets that descend, leave the values, or have another shape or type."""
    write_shards(tmp_path / "s", lambda number: {"a": np.arange(number + 1)}, 2, {})
    forge_chunk(tmp_path / "s", "a.offsets.npy", np.asarray(offsets))
    with pytest.raises(ValueError, match="ascending offsets|the index needs"):
        TokenShards(tmp_path / "s")[1]


@pytest.mark.parametrize(
    "values", [np.zeros((3, 2)), np.zeros(3, dtype=bool), np.zeros(3, dtype=complex), np.zeros(99)]
)
def test_values_of_another_shape_or_type_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    """The index names shape and type of each field."""
    write_shards(tmp_path / "s", lambda number: {"a": np.arange(number + 1)}, 2, {})
    forge_chunk(tmp_path / "s", "a.npy", values)
    with pytest.raises(ValueError, match="the index needs"):
        TokenShards(tmp_path / "s")[0]


FIELD = {"dtype": "int16", "shape": [], "scalar": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_records": 0},
        {"num_records": 10**9},
        {"num_records": True},
        {"num_records": "2"},
        {"records_per_chunk": -1},
        {"records_per_chunk": 0.5},
        {"fingerprint": []},
        {"fields": []},
        {"fields": {"../../../etc/passwd": FIELD}},
        {"fields": {"/etc/passwd": FIELD}},
        {"fields": {"..": FIELD}},
        {"fields": {"": FIELD}},
        {"fields": {"a": None}},
        {"fields": {"a": FIELD | {"dtype": "object"}}},
        {"fields": {"a": FIELD | {"dtype": []}}},
        {"fields": {"a": FIELD | {"shape": [-1]}}},
        {"fields": {"a": FIELD | {"scalar": 1}}},
        {"chunks": []},
        {"chunks": None},
        {"chunks": [None]},
    ],
)
def test_an_index_that_makes_no_sense_is_refused_when_it_is_opened(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Numbers, names of fields, types and shapes; no path leaves the folder."""
    write_shards(tmp_path / "s", lambda number: {"a": np.arange(2)}, 2, {})
    edit_index(tmp_path / "s", **changes)
    with pytest.raises(ValueError, match="index.json is not an index of token shards; write the shards again"):
        TokenShards(tmp_path / "s")


@pytest.mark.parametrize("text", ["[]", "{}", "null", '"x"', "", "[" * 10_000])
@pytest.mark.parametrize("name", ["index.json", "plan.json", "chunk-00000/fields.json"])
def test_other_json_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    """Opening, reading and continuing a folder."""
    write_shards(tmp_path / "s", lambda number: {"a": np.arange(2)}, 2, {})
    (tmp_path / "s" / name).write_text(text)
    with pytest.raises(ValueError, match="s"):
        if name == "plan.json":
            write_shards(tmp_path / "s", lambda number: {"a": np.arange(2)}, 2, {})
        else:
            TokenShards(tmp_path / "s")[0]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\nb", "ö", "x" * 101])
def test_field_names_must_be_plain(tmp_path: Path, name: str) -> None:
    """A field name is part of two file names."""
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        write_shards(tmp_path / "s", lambda number: {name: np.arange(2)}, 2, {})
    assert not list(tmp_path.glob("up*"))


def test_a_bit_flip_in_a_chunk_is_found_when_the_chunk_is_opened(tmp_path: Path) -> None:
    """Other chunks can still be read; after deleting the chunk, only the chunk is computed again."""
    arguments = make_record, 8, {}, 4
    write_shards(tmp_path / "s", *arguments)
    path = next((tmp_path / "s" / "chunk-00001").glob("*.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shards = TokenShards(tmp_path / "s")
    assert shards[3]
    with pytest.raises(ValueError, match="chunk-00001.* has changed since it was written.*write the shards again"):
        shards[4]
    shutil.rmtree(path.parent)
    (tmp_path / "s" / "index.json").unlink()
    assert write_shards(tmp_path / "s", *arguments) == 1
    assert TokenShards(tmp_path / "s")[4]
    digest = TokenShards(tmp_path / "s").digest
    write_shards(tmp_path / "t", lambda number: {"a": np.arange(number + 1)}, 8, {})
    assert TokenShards(tmp_path / "t").digest != digest


@pytest.mark.parametrize("is_replaced", [False, True])
def test_chunks_that_change_after_their_check_are_named(tmp_path: Path, is_replaced: bool) -> None:
    """A training reads chunks hours after it has checked them; others of equal shape must not be trained on."""
    write_shards(tmp_path / "s", lambda number: {"a": np.full(4, number + 1)}, 8, {}, 4)
    write_shards(tmp_path / "other", lambda number: {"a": np.full(4, number + 5)}, 8, {}, 4)
    shards = TokenShards(tmp_path / "s")
    assert shards.longest("a") == 4 and shards[0]["a"][0] == 1
    chunk = tmp_path / "s" / "chunk-00001"
    if is_replaced:
        shutil.rmtree(chunk)
        shutil.copytree(tmp_path / "other" / "chunk-00001", chunk)
    else:
        data = (chunk / "a.npy").read_bytes()
        (chunk / "a.npy").write_bytes(data[:-2] + b"zz")
    with pytest.raises(ValueError, match="chunk-00001.* has changed since it was written"):
        shards[4]
    assert shards[3]["a"][0] == 4
