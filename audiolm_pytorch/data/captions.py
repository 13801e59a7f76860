"""What users write about a clip: captions in every form they come in, in manifest lines and in files beside clips."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from beartype import beartype

__all__ = [
    "decode_texts",
    "encode_texts",
    "is_encodable",
    "json_lines",
    "read_sidecar",
    "caption_and_labels",
    "texts_in",
]

SIDECAR_SUFFIXES = (".json", ".txt")
# Far beyond what anybody writes about a clip; a file without line ends must not fill the memory.
MAX_LINE_BYTES, MAX_SIDECAR_BYTES = 2**24, 2**20


@beartype
def texts_in(value: Any) -> list[str]:
    """List the texts of a value as users write captions: a text, a list of texts, or texts and lists by name.

    Args:
        value: Anything; what is no text, and blank texts, are left out.

    Returns:
        The texts in their order, each once.
    """
    return list(dict.fromkeys(leaf for leaf in _leaves(value) if isinstance(leaf, str) and leaf.strip()))


def _leaves(value: Any) -> list[Any]:
    """What a value holds: itself, or the entries of a list or a dict and of the lists right inside."""
    if not isinstance(value, list | tuple | dict):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [leaf for entry in entries for leaf in (entry if isinstance(entry, list | tuple) else [entry])]


@beartype
def is_encodable(text: str) -> bool:
    """Tell whether a text can be written: JSON may hold half of a surrogate pair, which tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@beartype
def encode_texts(texts: Sequence[str]) -> np.ndarray:
    """Turn texts into an array, as token shards hold them: the bytes `[n]` of a JSON list in UTF-8."""
    return np.frombuffer(json.dumps(list(texts)).encode(), dtype=np.uint8)


@beartype
def decode_texts(data: np.ndarray) -> list[str]:
    """Read the texts that `encode_texts` turned into an array, of whatever integers.

    Raises:
        ValueError: If the array holds anything else.
    """
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
    """Split what is said about a clip into its first caption and its labels.

    Args:
        fields: `caption` and `captions` are captions, each a text, a list of texts or texts and lists by name; all
            else are labels.

    Returns:
        The first caption, None if there is none, and the labels; these hold further captions as the list `captions`.

    Raises:
        ValueError: If a caption is no text.
    """
    for name in ("caption", "captions"):
        leaves = [leaf for leaf in _leaves(fields.get(name)) if leaf is not None]
        if not all(isinstance(leaf, str) and is_encodable(leaf) for leaf in leaves):
            said = ascii(fields[name])[:100]
            raise ValueError(f"{name!r} must be a text, a list of texts, or texts by name, got {said}")
    caption, further = fields.get("caption"), texts_in(fields.get("captions"))
    if not isinstance(caption, str) or not caption.strip():
        texts = [*texts_in(caption), *further]
        caption, further = next(iter(texts), None), texts[1:]
    labels = {name: value for name, value in fields.items() if name not in ("caption", "captions")}
    return caption, labels | ({"captions": further} if further else {})


@beartype
def read_sidecar(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Read what is written about a clip in a file beside it.

    Args:
        path: A `.txt` file, whose lines are captions, or a `.json` file, an object as a line of a manifest; its `audio`
            is not looked at, since the clip is the one it lies beside.

    Returns:
        As `caption_and_labels`.

    Raises:
        ValueError: If the file cannot be read as such; the message names a line where it can, not the file.
    """
    num_bytes = path.stat().st_size
    if num_bytes > MAX_SIDECAR_BYTES:
        raise ValueError(f"holds {num_bytes} bytes, at most {MAX_SIDECAR_BYTES} are read")
    text = _decoded(path.read_bytes())
    if path.suffix.lower() == ".json":
        fields = _json_object(text)
        fields.pop("audio", None)
        return caption_and_labels(fields)
    return caption_and_labels({"captions": [line.strip() for line in text.split("\n")]})


@beartype
def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of JSON objects, one a line; blank lines are skipped.

    Args:
        path: The file.

    Yields:
        Number of the line, from 1, and its object.

    Raises:
        ValueError: If a line is no object; the message names file and line.
    """
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES} bytes; write one object a line")
                text = _decoded(line)
                if text.strip():
                    yield number, _json_object(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text should be."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise ValueError(f"not JSON ({error}); it must be one object") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must be an object, {{...}}, got {type(fields).__name__}")
    return fields


def _decoded(data: bytes) -> str:
    """Text of a file that should be UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error}); save it in this encoding") from error
