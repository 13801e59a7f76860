"""Read captions and labels of audio files from manifests, tables and `.txt` and `.json` files beside the audio."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from audiolm_pytorch.checks.types import typed

__all__ = [
    "SIDECAR_SUFFIXES",
    "caption_and_labels",
    "decode_texts",
    "encode_texts",
    "is_encodable",
    "manifest_rows",
    "read_sidecar",
    "tags_in",
    "texts_in",
    "use_text_as_caption",
]

SIDECAR_SUFFIXES = (".json", ".txt")
# Far longer than any caption; a file without line ends must not fill the memory.
_MAX_LINE_BYTES, _MAX_SIDECAR_BYTES, _MAX_TABLE_BYTES = 2**24, 2**20, 2**26


@typed
def texts_in(value: Any) -> list[str]:
    """Return the texts in a caption value, which may be a text, a list of texts, or a dict of texts and lists.

    Repeated texts, blank texts and values that are not texts are left out; the order does not change.
    """
    return list(dict.fromkeys(leaf for leaf in _leaves(value) if isinstance(leaf, str) and leaf.strip()))


@typed
def tags_in(labels: dict[str, Any]) -> list[str]:
    """Return a text like `genre: rock` for each label that is a text, a number or a list of texts."""
    tags = []
    for name, value in labels.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        text = f"{value:g}" if is_number else ", ".join(texts_in(value))
        tags += [f"{name}: {text}"] if text else []
    return tags


def _leaves(value: Any) -> list[Any]:
    """Return the entries of a list or dict, with inner lists flattened; another value becomes a list of one entry."""
    if not isinstance(value, list | tuple | dict):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [leaf for entry in entries for leaf in (entry if isinstance(entry, list | tuple) else [entry])]


@typed
def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can encode a text; UTF-8 cannot encode lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@typed
def encode_texts(texts: Sequence[str]) -> np.ndarray:
    """Encode texts for token shards as a JSON list, in an array `[n]` of UTF-8 bytes."""
    return np.frombuffer(json.dumps(list(texts)).encode(), dtype=np.uint8)


@typed
def decode_texts(data: np.ndarray) -> list[str]:
    """Decode texts from the byte array that `encode_texts` returned; any integer type is accepted."""
    try:
        texts = json.loads(data.astype(np.uint8).tobytes())
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"the array must contain the bytes of a JSON list of texts, but begins with {data[:20].tolist()}"
        )
    return texts


@typed
def caption_and_labels(fields: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Split the manifest fields of an audio clip into the first caption (or None) and the labels.

    The fields `caption` and `captions` may be a text, a list of texts, or a dict of texts and lists. All fields except
    `caption` and `captions` are labels. The label `captions` lists the captions after the first caption.
    """
    for name in ("caption", "captions"):
        leaves = [leaf for leaf in _leaves(fields.get(name)) if leaf is not None and leaf == leaf]  # NaN is missing
        if not all(isinstance(leaf, str) and is_encodable(leaf) for leaf in leaves):
            raise ValueError(
                f"{name!r} must be a text, a list of texts, or a dict of texts, which UTF-8 can store, got "
                f"{ascii(fields[name])[:100]}"
            )
    caption, further = fields.get("caption"), texts_in(fields.get("captions"))
    if not isinstance(caption, str) or not caption.strip():
        texts = [*texts_in(caption), *further]
        caption, further = next(iter(texts), None), texts[1:]
    labels = {name: value for name, value in fields.items() if name not in ("caption", "captions")}
    return caption, labels | ({"captions": further} if further else {})


@typed
def read_sidecar(path: Path, source: io.IOBase | None = None) -> tuple[str | None, dict[str, Any]]:
    """Read the first caption and the labels of an audio clip from the `.txt` or `.json` file beside the audio file.

    Each line of a `.txt` file is a caption. A `.json` file contains the fields of a manifest line; the field `audio` is
    ignored. Error messages do not contain the file name; the caller must add the file name. With an open binary file
    `source`, `path` is only its name.
    """
    with path.open("rb") if source is None else nullcontext(source) as file:
        _check_size(file.seek(0, os.SEEK_END), _MAX_SIDECAR_BYTES)
        file.seek(0)
        text = _decoded(file.read())
    if path.suffix.lower() == ".json":
        fields = _json_object(text)
        fields.pop("audio", None)
        return caption_and_labels(fields)
    return caption_and_labels({"captions": [line.strip() for line in text.split("\n")]})


@typed
def use_text_as_caption(fields: dict[str, Any]) -> None:
    """Rename the field `text` of a row of Hugging Face to `caption` if the row has no other caption."""
    if not {"caption", "captions"} & fields.keys() and isinstance(fields.get("text"), str):
        fields["caption"] = fields.pop("text")


def manifest_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place ("line 3") and the fields of each row of a manifest.

    A manifest is a JSONL file with one object per line, a file with one JSON array of objects, or a `.csv` table with
    the names of the fields in its first line.
    """
    if path.suffix.lower() == ".csv":
        yield from _table_rows(path)
        return
    with path.open("rb") as file:
        begin = file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin.startswith(b"["):
        yield from _array_rows(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), start=1):
            try:
                if len(line) > _MAX_LINE_BYTES:
                    raise ValueError(f"the line is longer than {_MAX_LINE_BYTES} bytes; write one JSON object per line")
                text = _decoded(line)
                if text.strip():
                    yield f"line {number}", _json_object(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _array_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        _check_size(path.stat().st_size, _MAX_TABLE_BYTES)
        entries = _parsed_json(_decoded(path.read_bytes()))
        for number, fields in enumerate(entries, start=1):
            if not isinstance(fields, dict):
                raise ValueError(f"entry {number} must be a JSON object, {{...}}, got {type(fields).__name__}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for number, fields in enumerate(entries, start=1):
        yield f"entry {number}", fields


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        _check_size(path.stat().st_size, _MAX_TABLE_BYTES)
        reader = csv.DictReader(_decoded(path.read_bytes()).splitlines(keepends=True), strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} must have {len(reader.fieldnames or [])} values, as line 1")
            yield f"line {reader.line_num}", {name: cell or None for name, cell in row.items()}
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ValueError(f"the file has {num_bytes} bytes; shorten it to {max_bytes} bytes or fewer")


def _parsed_json(text: str) -> Any:
    """Parse JSON; NaN and infinity, with which pandas marks missing values, become None."""
    try:
        return json.loads(text, parse_constant=lambda constant: None)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise ValueError(f"the text is not JSON ({error}); write one JSON object") from error


def _json_object(text: str) -> dict[str, Any]:
    fields = _parsed_json(text)
    if not isinstance(fields, dict):
        raise ValueError(f"the text must be a JSON object, {{...}}, got {type(fields).__name__}")
    return fields


def _decoded(data: bytes) -> str:
    """Decode UTF-8 bytes, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 ({error}); save the file as UTF-8") from error
