"""Audio items of data sets of the package `datasets` (Hugging Face), and storage of streams in tar archives."""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import soundfile

from audiolm_pytorch.audio.formats import AUDIO_SUFFIXES
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import caption_and_labels, use_text_as_caption
from audiolm_pytorch.data.claims import claims
from audiolm_pytorch.data.items import ItemEntry, Rejected
from audiolm_pytorch.data.tars import TAR_SUFFIX
from audiolm_pytorch.saving.files import differences, read_versioned, write_json
from audiolm_pytorch.saving.ownership import check_overwrite
from audiolm_pytorch.saving.text import one_line

__all__ = ["HuggingFaceDataset", "hf_entries", "write_tars"]

_FORMAT_VERSION = 1
_PARTIAL = ".partial"
_STATE_FILE = ".stream.json"  # hidden, as it is not a caption


@runtime_checkable
class HuggingFaceDataset(Protocol):
    """Interface of `datasets.Dataset` and `datasets.IterableDataset`, which need not be installed."""

    features: Any

    def cast_column(self, column: str, feature: Any) -> Any:
        """Return the data set with another type of a column."""

    def with_format(self, type: Any = None) -> Any:
        """Return the data set with rows of another type; None = Python objects."""


@typed
def hf_entries(dataset: HuggingFaceDataset) -> list[ItemEntry | Rejected]:
    """List the rows of a data set of the package `datasets`, whose audio is decoded by soundfile.

    One column must have the type `Audio`. The columns are the fields of a manifest line; a `text` is the caption if
    there is no other. Row i has the path `Dataset[i]/NAME`, or that of its file if the data set refers to a file.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            "a streaming data set has no random access, which exact training needs; store it once with "
            "folder = audiolm_pytorch.data.write_tars(dataset, FOLDER), and pass this folder"
        )
    rows, column = _undecoded(dataset)
    sounds = rows.select_columns([column])
    entries: list[ItemEntry | Rejected] = []
    for index, row in enumerate(rows):
        sound = row.pop(column) or {}
        name = Path(f"{type(dataset).__name__}[{index}]", Path(sound.get("path") or "").name)
        try:
            texts = caption_and_labels(_fields(rows, row))
        except ValueError as error:
            entries.append(Rejected(name, str(error)))
            continue
        if sound.get("bytes") is None and os.path.isfile(sound.get("path") or ""):
            entries.append(ItemEntry(Path(sound["path"]), *texts))
        else:
            entries.append(ItemEntry(name, *texts, open=partial(_open_row, sounds, column, index)))
    return entries


def _undecoded(dataset: Any) -> tuple[Any, str]:
    """Return the data set with encoded audio and Python objects in its rows, and the name of its audio column."""
    from datasets import Audio

    features = dataset.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, Audio)]
    if len(columns) != 1:
        raise ValueError(
            f"the data set must have one column of the type Audio, got {columns} of {list(features)}; use "
            'cast_column("audio", Audio(decode=False)), or remove_columns'
        )
    return dataset.with_format(None).cast_column(columns[0], Audio(decode=False)), columns[0]


def _fields(dataset: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest line for a row, with the names of class labels instead of their numbers."""
    from datasets import ClassLabel

    for name, value in row.items():
        feature = dataset.features[name]
        if isinstance(feature, ClassLabel) and value is not None and value >= 0:
            row[name] = feature.int2str(value)
    use_text_as_caption(row)
    return row


def _open_row(sounds: Any, column: str, index: int) -> io.IOBase:
    return io.BytesIO(_encoded(sounds[index][column]))


def _encoded(sound: dict[str, Any] | None) -> bytes:
    """Return the encoded audio of a row; empty if there is none."""
    if not sound or (sound["bytes"] is None and not sound["path"]):
        return b""
    if sound["bytes"] is not None:
        return sound["bytes"]
    import fsspec  # a dependency of datasets, which also opens paths on the hub

    with fsspec.open(sound["path"], "rb") as file:
        return file.read()


@typed
def write_tars(dataset: HuggingFaceDataset, folder: str | Path, rows_per_tar: int = 1000) -> Path:
    """Store the rows of a (streaming) data set of the package `datasets` in tar archives, and return the folder.

    The folder is a data source of all trainers. Audio is stored as it is, not decoded. An interrupted call can be
    continued with the last archive, and a call with a complete folder reads nothing. A stream with a shuffle buffer is
    refused, since `datasets` loses the rows in the buffer when it continues; training shuffles the files.
    """
    if rows_per_tar < 1:
        raise ValueError(f"rows_per_tar must be at least 1, got {rows_per_tar}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, column = _undecoded(dataset)
    if hasattr(rows, "to_iterable_dataset"):
        rows = rows.to_iterable_dataset()
    if _is_shuffled(rows):
        raise ValueError("the stream is shuffled, and could not be continued; pass it without shuffle()")
    columns = {name: str(feature) for name, feature in rows.features.items()}
    state: dict[str, Any] = {"columns": columns, "rows_per_tar": rows_per_tar, "num_rows": 0, "is_complete": False}
    file = folder / _STATE_FILE
    check_overwrite(file, ("format_version", "num_rows", "is_complete"))
    with claims(folder, wait=True) as claim:
        claim(0)
        if file.is_file():
            stored = read_versioned(file, _FORMAT_VERSION)
            same = ("columns", "rows_per_tar")
            if lines := differences({name: stored.get(name) for name in same}, {name: state[name] for name in same}):
                raise ValueError(f"{folder} contains rows of another data set; use another folder: {'; '.join(lines)}")
            state = stored
            rows.load_state_dict(stored["position"])
        for leftover in folder.glob(f".*{_PARTIAL}"):  # of processes that were killed
            leftover.unlink()
        stream = iter(rows)
        while not state["is_complete"]:
            path = folder / f"{state['num_rows'] // rows_per_tar:06d}{TAR_SUFFIX}"
            members = (_members(rows, column, row, number) for number, row in enumerate(stream, state["num_rows"]))
            num_written = _write_tar(path, islice(members, rows_per_tar))
            if not state["num_rows"] + num_written:
                raise ValueError("the data set has no rows; pass at least one row")
            state["num_rows"] += num_written
            state |= {"is_complete": num_written < rows_per_tar, "position": rows.state_dict()}
            write_json(file, {"format_version": _FORMAT_VERSION, **state}, sealed=True)
    return folder


def _is_shuffled(stream: Any) -> bool:
    """Whether a stream, or a stream that it reads, has a shuffle buffer."""
    step = getattr(stream, "_ex_iterable", None)  # not public, and no other way is
    while step is not None and "BufferShuffled" not in type(step).__name__:
        step = getattr(step, "ex_iterable", None)
    return step is not None


def _members(rows: Any, column: str, row: dict[str, Any], number: int) -> dict[str, bytes]:
    """Return the members of an archive for a row: its audio, and its other columns as JSON."""
    sound = row.pop(column)
    data = _encoded(sound)
    suffix = _suffix((sound or {}).get("path"), data)
    return {f"{number:09d}{suffix}": data, f"{number:09d}.json": _json(_fields(rows, row), number)}


def _write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> int:
    """Write the members of samples to an archive, and return the number of samples; without any, nothing is written.

    The archive gets its name when it is complete. Equal samples lead to equal bytes.
    """
    partial_file = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    num_samples = 0
    try:
        with tarfile.open(partial_file, "w") as tar:
            for sample in samples:
                num_samples += 1
                for name, data in sample.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        if num_samples:
            os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)
    return num_samples


def _suffix(path: str | None, data: bytes) -> str:
    """Return the suffix of the audio of a row, from its path or its format."""
    suffix = Path(path or "").suffix.lower()
    if suffix in AUDIO_SUFFIXES:
        return suffix
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return f".{file.format.lower()}" if f".{file.format.lower()}" in AUDIO_SUFFIXES else ".wav"
    except soundfile.LibsndfileError:
        return ".wav"  # reported when the folder is listed


def _json(fields: dict[str, Any], number: int) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"row {number}: JSON cannot store its columns ({one_line(error)}); leave them out with remove_columns"
        ) from error
