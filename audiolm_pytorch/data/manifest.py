"""Which audio files a training run sees: folders and JSON-lines manifests, checked file by file before training."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.audio.files import decoded_info
from audiolm_pytorch.data.captions import (
    SIDECAR_SUFFIXES,
    caption_and_labels,
    json_lines,
    read_sidecar,
    texts_in,
)

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

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
TRAIN_MANIFEST, VALID_MANIFEST = "train.jsonl", "valid.jsonl"
MAX_REJECTED_IN_LOG = 20
MAX_READERS = 8


@dataclass(frozen=True)
class AudioItem:
    """One usable audio file, with what its manifest says about it; the length is what could be decoded."""

    path: Path
    caption: str | None
    labels: dict[str, Any]
    sample_hz: int
    num_samples: int


@dataclass(frozen=True)
class Rejected:
    """One file that is left out, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ItemReport:
    """What a folder or manifest holds: the usable items in order, and what was left out."""

    items: list[AudioItem]
    rejected: list[Rejected]


@dataclass(frozen=True)
class ItemEntry:
    """A file that is still to be checked, with what is said about it."""

    path: Path
    caption: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)


@beartype
def captions_of(item: AudioItem) -> list[str]:
    """List every caption of an item: its `caption`, and those of the label `captions`.

    Args:
        item: Its label may be a text, a list of texts, or texts and lists by name; what is no text is left out.

    Returns:
        The captions in that order, each once.
    """
    return texts_in([item.caption, *texts_in(item.labels.get("captions"))])


@beartype
def load_items(source: str | Path, min_seconds: float | int = 0.0) -> ItemReport:
    """List the audio files of a folder or a manifest, and decode each once to see that it can be used.

    Args:
        source: A folder (all .wav, .flac, .mp3 and .ogg files below it, in order of their names; hidden files are
            skipped), a folder that holds a `train.jsonl` (then that file decides), or a `.jsonl` file. In a folder,
            `x.txt` beside `x.wav` holds its captions, one a line, and `x.json` what a line of a manifest would. A
            manifest line is an object with `audio` (path, relative to the manifest) and perhaps `caption` and
            `captions` (each a text, a list of texts, or texts by name; several captions: the first is the item's
            caption, the others its label `captions`); all else becomes labels.
        min_seconds: Shorter files are rejected.

    Returns:
        Usable items in the order of the source, and the rejected ones with reasons (also logged in one warning). A
        caption file that cannot be read is rejected too, with a warning of its own, and its clip has no caption.

    Raises:
        ValueError: If the source does not exist, a manifest line is malformed (its number is named), or nothing can be
            used.
    """
    source = Path(source)
    manifest = _manifest_of(source)
    entries, unread = _folder_entries(source) if manifest is None else (_manifest_entries(manifest), [])
    report = check_entries(entries, source, min_seconds)
    if unread:
        logger.warning("%s: %d caption files cannot be used: %s", source, len(unread), _summary(unread))
    return ItemReport(report.items, [*report.rejected, *unread])


@beartype
def check_entries(entries: Sequence[ItemEntry], source: Path, min_seconds: float | int = 0.0) -> ItemReport:
    """Decode files once to see that they can be used.

    Args:
        entries: The files.
        source: Where they were named; messages begin with it.
        min_seconds: Shorter files are rejected.

    Returns:
        Usable items in order, and the rejected ones with reasons (also logged in one warning).

    Raises:
        ValueError: If no file can be used.
    """
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
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


def _manifest_of(source: Path) -> Path | None:
    """The manifest that a source names, if it names one."""
    if source.suffix.lower() == ".jsonl" and not source.is_dir():
        return source
    manifest = source / TRAIN_MANIFEST
    return manifest if manifest.is_file() else None


@beartype
def audio_files(folder: Path) -> dict[Path, list[Path]]:
    """Find the audio files below a folder and the caption files beside them.

    Args:
        folder: Where to look; hidden files are other programs' leftovers, not music.

    Returns:
        Audio files in an order that does not depend on the file system, each with its `.json` and `.txt` files.

    Raises:
        ValueError: If there is no such folder.
    """
    if not folder.is_dir():
        what = "is a file; give its folder, or a .jsonl manifest" if folder.is_file() else "no such folder or manifest"
        raise ValueError(f"{folder}: {what}")
    sidecars: dict[Path, list[Path]] = {}
    found: list[Path] = []
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*")):
        suffix = path.suffix.lower()
        # macOS "._song.wav", our own unfinished writes
        if suffix not in (*SUFFIXES, *SIDECAR_SUFFIXES) or any(part.startswith(".") for part in path.parts):
            continue
        if (folder / path).is_file():
            beside = found if suffix in SUFFIXES else sidecars.setdefault(path.with_suffix(""), [])
            beside.append(path)
    return {folder / path: [folder / own for own in sidecars.get(path.with_suffix(""), ())] for path in found}


def _folder_entries(folder: Path) -> tuple[list[ItemEntry], list[Rejected]]:
    """Every audio file below a folder with what lies beside it, and the caption files that cannot be read."""
    files = audio_files(folder)
    if not files:
        raise ValueError(f"{folder}: holds no {', '.join(SUFFIXES)} files and no {TRAIN_MANIFEST}")
    entries, unread = [], []
    for path, sidecars in files.items():
        captions: list[str | None] = []
        labels: dict[str, Any] = {}
        for sidecar in sidecars:
            try:
                caption, own = read_sidecar(sidecar)
            except (ValueError, OSError) as error:
                unread.append(Rejected(sidecar, f"{error}; mend or delete it, {path.name} is used without it"))
                continue
            captions += [caption, *own.pop("captions", ())]
            labels |= own
        entries.append(ItemEntry(path, *caption_and_labels(labels | {"captions": captions})))
    return entries, unread


def _manifest_entries(manifest: Path) -> list[ItemEntry]:
    """Every line of a manifest."""
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest")
    entries = [_manifest_entry(fields, manifest, number) for number, fields in json_lines(manifest)]
    if not entries:
        raise ValueError(f"{manifest}: holds no lines")
    return entries


def _manifest_entry(fields: dict[str, Any], manifest: Path, number: int) -> ItemEntry:
    """One line of a manifest, or a ValueError that names it."""
    audio = fields.pop("audio", None)
    try:
        if not isinstance(audio, str) or not audio:
            raise ValueError(f"'audio' must be a path, got {audio!r}")
        return ItemEntry(manifest.parent / audio, *caption_and_labels(fields))
    except ValueError as error:
        raise ValueError(f"{manifest}, line {number}: {error}") from error


@beartype
def manifest_text(items: Sequence[AudioItem | ItemEntry], folder: str | Path) -> str:
    """Write items as the manifest of a folder, as `load_items` and every trainer read it.

    Args:
        items: What to write.
        folder: Where the manifest will be. Files below it are named relative to it, so that all can move together.

    Returns:
        One JSON object a line.

    Raises:
        ValueError: If a label cannot be JSON.
    """
    return "".join(f"{_line(item, Path(folder).absolute())}\n" for item in items)


def _line(item: AudioItem | ItemEntry, folder: Path) -> str:
    """An item as a line of a manifest in a folder."""
    audio = item.path.absolute()
    named = audio.relative_to(folder) if audio.is_relative_to(folder) else audio
    try:
        own = {"audio": named.as_posix(), "caption": item.caption}
        return json.dumps(own | item.labels | own, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{item.path}: its labels cannot be JSON ({error})") from error


def _checked(entry: ItemEntry, min_seconds: float) -> AudioItem | Rejected:
    """Decode a file and say whether it can be used."""
    try:
        info = decoded_info(entry.path)
    except (ValueError, OSError) as error:
        return Rejected(entry.path, str(error).removeprefix(f"{entry.path}: "))
    if info.num_samples < min_seconds * info.sample_hz:
        seconds = info.num_samples / info.sample_hz
        return Rejected(entry.path, f"too short: {seconds:.3f} s, at least {min_seconds} s are needed")
    return AudioItem(entry.path, entry.caption, entry.labels, info.sample_hz, info.num_samples)


def _summary(rejected: Sequence[Rejected]) -> str:
    """The rejected files with their reasons, in one line that stays readable."""
    shown = [f"{item.path} ({item.reason})" for item in rejected[:MAX_REJECTED_IN_LOG]]
    more = len(rejected) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


@beartype
def split_items(
    items: Sequence[AudioItem], valid_fraction: float = 0.05, seed: int = 0
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Split items into training and validation ones by a hash of their names.

    An item keeps its side when others are added, when the folder moves, and on every machine.

    Args:
        items: What to split.
        valid_fraction: Expected share of validation items, in 0..1.
        seed: Another seed gives another split.

    Returns:
        Training and validation items, in order; of two or more items each side gets at least one.

    Raises:
        ValueError: If the fraction lies outside 0..1 or there are no items.
    """
    if not 0.0 <= valid_fraction <= 1.0 or not items:
        raise ValueError(
            f"need 0 <= valid_fraction <= 1 and at least one item, got {valid_fraction} and {len(items)} items"
        )
    draws = [_uniform_hash(name, seed) for name in _distinct_names([item.path for item in items])]
    is_valid = [draw < valid_fraction for draw in draws]
    if len(items) == 1:
        is_valid = [False]
    elif not any(is_valid):
        is_valid[draws.index(min(draws))] = True
    elif all(is_valid):
        is_valid[draws.index(max(draws))] = False
    train = [item for item, held_out in zip(items, is_valid, strict=True) if not held_out]
    return train, [item for item, held_out in zip(items, is_valid, strict=True) if held_out]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names, or paths below the common folder where file names repeat (song1/mix.wav, song2/mix.wav)."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    absolute = [path.absolute() for path in paths]
    common = Path(os.path.commonpath(absolute)) if len({path.anchor for path in absolute}) == 1 else None
    return [(path.relative_to(common) if common else path).as_posix() for path in absolute]


def _uniform_hash(name: str, seed: int) -> float:
    """A number in 0..1 that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@beartype
def load_split(
    source: str | Path, valid_fraction: float = 0.05, seed: int = 0, min_seconds: float | int = 0.0
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Load training and validation items.

    Args:
        source: As for `load_items`; a folder with both `train.jsonl` and `valid.jsonl` is split by these.
        valid_fraction: Share of validation items where the source does not say.
        seed: Seed of that split.
        min_seconds: Shorter files are rejected.

    Returns:
        Training and validation items.

    Raises:
        ValueError: As `load_items`.
    """
    source = Path(source)
    manifests: Iterable[Path] = (source / TRAIN_MANIFEST, source / VALID_MANIFEST)
    if all(manifest.is_file() for manifest in manifests):
        train, valid = (load_items(manifest, min_seconds).items for manifest in manifests)
        return train, valid
    return split_items(load_items(source, min_seconds).items, valid_fraction, seed)


@beartype
def training_items(
    folder: str | Path | None,
    items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None,
    min_seconds: float | int = 0.0,
) -> tuple[list[AudioItem], list[AudioItem]]:
    """What a trainer learns from and validates on, from whichever source its caller has.

    Args:
        folder: As for `load_split`.
        items: Training and validation items that are at hand already.
        min_seconds: Length of one token. Shorter files of a folder are left out, shorter items are refused.

    Returns:
        Training and validation items; where there is nothing to validate on, the training items serve for that too.

    Raises:
        ValueError: If both or neither are given, there is nothing to learn from, or an item is too short.
    """
    if (folder is None) == (items is None):
        raise ValueError("give either a folder (or manifest) of audio or (train, valid) items")
    train, valid = items if items is not None else load_split(folder or "", min_seconds=min_seconds)
    if not train:
        raise ValueError("there is no audio to learn from: the training items are empty")
    short = [str(item.path) for item in (*train, *valid) if item.num_samples < min_seconds * item.sample_hz]
    if short:
        raise ValueError(f"{len(short)} files are shorter than one token ({min_seconds} s); drop them: {short[:5]}")
    return list(train), list(valid) or list(train)
