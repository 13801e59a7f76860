"""List the audio files of a folder or a JSON-lines manifest, and check each file before training."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.audio.files import decoded_info
from audiolm_pytorch.data.captions import SIDECAR_SUFFIXES, caption_and_labels, json_lines, read_sidecar, texts_in

__all__ = [
    "AudioItem",
    "ItemEntry",
    "ItemReport",
    "Rejected",
    "audio_files",
    "captions_of",
    "check_entries",
    "load_items",
    "load_split",
    "manifest_text",
    "split_items",
    "training_items",
]

logger = logging.getLogger(__name__)

_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
_TRAIN_MANIFEST, _VALID_MANIFEST = "train.jsonl", "valid.jsonl"
_MAX_REJECTED_IN_LOG = 20
_MAX_READERS = 8


@dataclass(frozen=True)
class ItemEntry:
    """Path, caption and labels of an audio file that is not checked yet."""

    path: Path
    caption: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AudioItem:
    """Audio file that can be decoded, with caption and labels; `num_samples` is the number of decoded samples."""

    path: Path
    caption: str | None
    labels: dict[str, Any]
    sample_hz: int
    num_samples: int


@dataclass(frozen=True)
class Rejected:
    """Audio or caption file that cannot be used, and the reason."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ItemReport:
    """Usable audio files, in the order of the folder or manifest, and rejected files."""

    items: list[AudioItem]
    rejected: list[Rejected]


@beartype
def captions_of(item: AudioItem) -> list[str]:
    """Return the captions of an item without repetitions: `item.caption`, then the texts of the label `captions`."""
    return texts_in([item.caption, *texts_in(item.labels.get("captions"))])


@beartype
def load_items(source: str | Path, min_seconds: float | int = 0.0) -> ItemReport:
    """List the audio files of a folder or manifest, and decode each file to check that it can be used.

    Args:
        source: A folder or a `.jsonl` manifest. If a folder contains a `train.jsonl`, only the files in this manifest
            are used. In a folder without `train.jsonl`, all .wav, .flac, .mp3 and .ogg files are used, also those in
            subfolders, sorted by name; hidden files are skipped. The captions of `x.wav` may be in `x.txt`, one caption
            per line, or in `x.json`, with the fields of a manifest line. A manifest line is a JSON object with the
            field `audio` (path relative to the manifest), and optionally `caption` and `captions` (see
            `caption_and_labels`). All other fields of a manifest line become labels.
        min_seconds: Minimum duration of an audio file; shorter files are rejected.

    Returns:
        Usable and rejected files. A warning lists rejected audio files and caption files that cannot be read. An audio
        file is used even if its caption file cannot be read. If no audio file can be used, a ValueError is raised.
    """
    source = Path(source)
    manifest: Path | None = source
    if source.is_dir() or source.suffix.lower() != ".jsonl":
        manifest = source / _TRAIN_MANIFEST
        if not manifest.is_file():
            manifest = None
    entries, unreadable = _folder_entries(source) if manifest is None else (_manifest_entries(manifest), [])
    report = check_entries(entries, source, min_seconds)
    if unreadable:
        logger.warning("%s: %d caption files cannot be used: %s", source, len(unreadable), _summary(unreadable))
    return ItemReport(report.items, [*report.rejected, *unreadable])


@beartype
def check_entries(entries: Sequence[ItemEntry], source: Path, min_seconds: float | int = 0.0) -> ItemReport:
    """Decode the audio files of `entries` to check that they can be used; error messages begin with `source`."""
    with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as readers:
        checked = list(readers.map(lambda entry: _checked(entry, min_seconds), entries))
    report = ItemReport(
        items=[item for item in checked if isinstance(item, AudioItem)],
        rejected=[item for item in checked if isinstance(item, Rejected)],
    )
    summary = _summary(report.rejected)
    if not report.items:
        raise ValueError(f"{source}: none of {len(checked)} audio files can be used: {summary}")
    if report.rejected:
        logger.warning("%s: left out %d of %d audio files: %s", source, len(report.rejected), len(checked), summary)
    return report


def _checked(entry: ItemEntry, min_seconds: float) -> AudioItem | Rejected:
    try:
        info = decoded_info(entry.path)
    except (ValueError, OSError) as error:
        return Rejected(entry.path, str(error).removeprefix(f"{entry.path}: "))
    if info.num_samples < min_seconds * info.sample_hz:
        seconds = info.num_samples / info.sample_hz
        return Rejected(entry.path, f"too short: {seconds:.3f} s, at least {min_seconds} s are needed")
    return AudioItem(entry.path, entry.caption, entry.labels, info.sample_hz, info.num_samples)


def _summary(rejected: Sequence[Rejected]) -> str:
    """Format rejected files and their reasons as one line of limited length."""
    shown = [f"{item.path} ({item.reason})" for item in rejected[:_MAX_REJECTED_IN_LOG]]
    more = len(rejected) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


@beartype
def audio_files(folder: Path) -> dict[Path, list[Path]]:
    """Find the audio files below a folder, each with its `.json` and `.txt` caption files; hidden files are skipped.

    The audio files are sorted by path, independently of the file system.
    """
    if not folder.is_dir():
        reason = (
            "is a file; pass its folder, or a .jsonl manifest" if folder.is_file() else "no such folder or manifest"
        )
        raise ValueError(f"{folder}: {reason}")
    sidecars: dict[Path, list[Path]] = {}
    audio: list[Path] = []
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*")):
        suffix = path.suffix.lower()
        # hidden: macOS "._song.wav", and unfinished files of this library
        if suffix not in (*_SUFFIXES, *SIDECAR_SUFFIXES) or any(part.startswith(".") for part in path.parts):
            continue
        if (folder / path).is_file():
            (audio if suffix in _SUFFIXES else sidecars.setdefault(path.with_suffix(""), [])).append(path)
    return {folder / path: [folder / sidecar for sidecar in sidecars.get(path.with_suffix(""), ())] for path in audio}


def _folder_entries(folder: Path) -> tuple[list[ItemEntry], list[Rejected]]:
    """List the audio files below a folder with their captions, and the caption files that cannot be read."""
    files = audio_files(folder)
    if not files:
        raise ValueError(f"{folder}: the folder has no {', '.join(_SUFFIXES)} files and no {_TRAIN_MANIFEST}")
    entries, unreadable = [], []
    for path, sidecars in files.items():
        captions: list[str | None] = []
        labels: dict[str, Any] = {}
        for sidecar in sidecars:
            try:
                caption, further = read_sidecar(sidecar)
            except (ValueError, OSError) as error:
                unreadable.append(Rejected(sidecar, f"{error}; fix or delete it, {path.name} is used without it"))
                continue
            captions += [caption, *further.pop("captions", ())]
            labels |= further
        entries.append(ItemEntry(path, *caption_and_labels(labels | {"captions": captions})))
    return entries, unreadable


def _manifest_entries(manifest: Path) -> list[ItemEntry]:
    if not manifest.is_file():
        raise ValueError(f"{manifest}: the manifest does not exist; pass an existing .jsonl file")
    entries = []
    for number, fields in json_lines(manifest):
        audio = fields.pop("audio", None)
        try:
            if not isinstance(audio, str) or not audio:
                raise ValueError(f"the field 'audio' must be a path, got {audio!r}")
            entries.append(ItemEntry(manifest.parent / audio, *caption_and_labels(fields)))
        except ValueError as error:
            raise ValueError(f"{manifest}, line {number}: {error}") from error
    if not entries:
        raise ValueError(f"{manifest}: the manifest has no lines; write one JSON object per audio file")
    return entries


@beartype
def manifest_text(items: Sequence[AudioItem | ItemEntry], folder: str | Path) -> str:
    """Return the text of a JSON-lines manifest of the items, for a manifest file in `folder`.

    Audio files below `folder` have relative paths, so that the folder can be moved together with the manifest.
    """
    folder, lines = Path(folder).absolute(), []
    for item in items:
        audio = item.path.absolute()
        name = audio.relative_to(folder) if audio.is_relative_to(folder) else audio
        first = {"audio": name.as_posix(), "caption": item.caption}
        try:
            lines.append(json.dumps(first | item.labels | first, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{item.path}: JSON cannot store the labels ({error}); use strings and numbers") from error
    return "".join(lines)


@beartype
def split_items(
    items: Sequence[AudioItem], valid_fraction: float | int = 0.05, seed: int = 0
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Split items into training and validation items by a hash of the file names.

    The choice between training and validation does not change if other items are added, if the folder is moved, or on
    another machine. If there are two or more items, both returned lists contain at least one item.
    """
    if not 0.0 <= valid_fraction <= 1.0 or not items:
        raise ValueError(
            f"need 0 <= valid_fraction <= 1 and at least one item, got {valid_fraction=} and {len(items)} items"
        )
    hashes = [_uniform_hash(name, seed) for name in _distinct_names([item.path for item in items])]
    is_valid = [value < valid_fraction for value in hashes]
    if len(items) == 1:
        is_valid = [False]
    elif not any(is_valid):
        is_valid[hashes.index(min(hashes))] = True
    elif all(is_valid):
        is_valid[hashes.index(max(hashes))] = False
    train = [item for item, held_out in zip(items, is_valid, strict=True) if not held_out]
    return train, [item for item, held_out in zip(items, is_valid, strict=True) if held_out]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return different names for all files: the file names, or paths below the common folder if file names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    absolute = [path.absolute() for path in paths]
    common = Path(os.path.commonpath(absolute)) if len({path.anchor for path in absolute}) == 1 else None
    return [(path.relative_to(common) if common else path).as_posix() for path in absolute]


def _uniform_hash(name: str, seed: int) -> float:
    """Hash a name and a seed to a number in [0, 1), which is equal on all machines."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@beartype
def load_split(
    source: str | Path, valid_fraction: float | int = 0.05, seed: int = 0, min_seconds: float | int = 0.0
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Load the training items and the validation items of a folder or manifest (see `load_items` and `split_items`).

    If a folder contains `train.jsonl` and `valid.jsonl`, the two manifests list the training and validation items.
    """
    source = Path(source)
    manifests = [source / _TRAIN_MANIFEST, source / _VALID_MANIFEST]
    if all(manifest.is_file() for manifest in manifests):
        train, valid = (load_items(manifest, min_seconds).items for manifest in manifests)
        return train, valid
    return split_items(load_items(source, min_seconds).items, valid_fraction, seed)


def check_one_source(folder: str | Path | None, items: Sequence[Any] | None) -> None:
    """Check that a trainer received either a folder or items, not both."""
    if (folder is None) == (items is None):
        received = "neither folder nor items" if folder is None else "both folder and items"
        raise ValueError(f"got {received}; pass either a folder (or a manifest) or items")


@beartype
def training_items(
    folder: str | Path | None,
    items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None,
    min_seconds: float | int = 0.0,
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Return the training and validation items of a trainer, from a folder (see `load_split`) or from loaded items.

    If there are no validation items, the training items are also used for validation.

    Args:
        min_seconds: Duration of one token. Files of `folder` that are shorter than one token are left out; an item of
            `items` that is shorter than one token raises a ValueError.
    """
    check_one_source(folder, items)
    train, valid = items if items is not None else load_split(folder or "", min_seconds=min_seconds)
    if not train:
        raise ValueError("got an empty list of training items; pass at least one audio item")
    too_short = [str(item.path) for item in (*train, *valid) if item.num_samples < min_seconds * item.sample_hz]
    if too_short:
        raise ValueError(f"{len(too_short)} files are shorter than one token ({min_seconds} s); remove {too_short[:5]}")
    return list(train), list(valid) or list(train)
