"""Read captions and labels of audio files from manifest lines and from `.txt` and `.json` files beside the audio."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from beartype import beartype

__all__ = [
    "SIDECAR_SUFFIXES",
    "caption_and_labels",
    "decode_texts",
    "encode_texts",
    "is_encodable",
    "json_lines",
    "read_sidecar",
    "texts_in",
]

SIDECAR_SUFFIXES = (".json", ".txt")
# Far longer than any caption; a file without line ends must not fill the memory.
_MAX_LINE_BYTES, _MAX_SIDECAR_BYTES = 2**24, 2**20


@beartype
def texts_in(value: Any) -> list[str]:
    """List the texts in a caption value, which may be a text, a list of texts, or a dict of texts and lists.

    Each text is listed once, in order; blank texts and values of other types are left out.
    """
    return list(dict.fromkeys(leaf for leaf in _leaves(value) if isinstance(leaf, str) and leaf.strip()))


def _leaves(value: Any) -> list[Any]:
    """List a value that is no list or dict, or the entries of a list or dict and of lists directly inside it."""
    if not isinstance(value, list | tuple | dict):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [leaf for entry in entries for leaf in (entry if isinstance(entry, list | tuple) else [entry])]


@beartype
def is_encodable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; a text with a lone half of a surrogate pair cannot be encoded."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@beartype
def encode_texts(texts: Sequence[str]) -> np.ndarray:
    """Encode texts as an array `[n]` for token shards: the UTF-8 bytes of a JSON list."""
    return np.frombuffer(json.dumps(list(texts)).encode(), dtype=np.uint8)


@beartype
def decode_texts(data: np.ndarray) -> list[str]:
    """Decode an array of `encode_texts`, of any integer type, into the texts."""
    try:
        texts = json.loads(data.astype(np.uint8).tobytes())
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"the texts of a record must be the bytes of a JSON list of texts, got {data[:20].tolist()}..."
        )
    return texts


@beartype
def caption_and_labels(fields: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Split the fields of an audio clip into its first caption (None if it has none) and its labels.

    The fields `caption` and `captions` hold captions: a text, a list of texts, or a dict of texts and lists. All other
    fields are labels. Captions after the first one become the label `captions`, a list.
    """
    for name in ("caption", "captions"):
        leaves = [leaf for leaf in _leaves(fields.get(name)) if leaf is not None]
        if not all(isinstance(leaf, str) and is_encodable(leaf) for leaf in leaves):
            raise ValueError(
                f"{name!r} must be a text, a list of texts, or texts by name, got {ascii(fields[name])[:100]}"
            )
    caption, further = fields.get("caption"), texts_in(fields.get("captions"))
    if not isinstance(caption, str) or not caption.strip():
        texts = [*texts_in(caption), *further]
        caption, further = next(iter(texts), None), texts[1:]
    labels = {name: value for name, value in fields.items() if name not in ("caption", "captions")}
    return caption, labels | ({"captions": further} if further else {})


@beartype
def read_sidecar(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Read caption and labels of an audio clip from the file beside it; the result is that of `caption_and_labels`.

    Each line of a `.txt` file is a caption. A `.json` file is an object like a manifest line; its field `audio` is
    ignored. Error messages do not name the file; the caller adds the name.
    """
    num_bytes = path.stat().st_size
    if num_bytes > _MAX_SIDECAR_BYTES:
        raise ValueError(f"has {num_bytes} bytes; shorten it to {_MAX_SIDECAR_BYTES} bytes or fewer")
    text = _decoded(path.read_bytes())
    if path.suffix.lower() == ".json":
        fields = _json_object(text)
        fields.pop("audio", None)
        return caption_and_labels(fields)
    return caption_and_labels({"captions": [line.strip() for line in text.split("\n")]})


@beartype
def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of a JSONL file; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), start=1):
            try:
                if len(line) > _MAX_LINE_BYTES:
                    raise ValueError(f"longer than {_MAX_LINE_BYTES} bytes; write one object a line")
                text = _decoded(line)
                if text.strip():
                    yield number, _json_object(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise ValueError(f"not JSON ({error}); it must be one object") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, {{...}}, got {type(fields).__name__}")
    return fields


def _decoded(data: bytes) -> str:
    """Decode UTF-8 bytes, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error}); save it as UTF-8") from error
