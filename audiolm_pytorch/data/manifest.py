"""List the audio of folders, manifests, archives and data sets, and check every file before training."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from audiolm_pytorch.audio.files import decoded_info
from audiolm_pytorch.audio.waves import check_rate
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import texts_in
from audiolm_pytorch.data.entries import TRAIN_MANIFEST, local_path, source_entries, summary_of
from audiolm_pytorch.data.hf_dataset import HuggingFaceDataset, hf_entries
from audiolm_pytorch.data.items import AudioItem, ItemEntry, ItemReport, Rejected, Requirements, content_digest
from audiolm_pytorch.data.wave_dataset import dataset_items
from audiolm_pytorch.saving.text import logger_named, printable

__all__ = [
    "AudioItem",
    "AudioSplit",
    "DataSource",
    "ItemReport",
    "captions_of",
    "check_entries",
    "load_items",
    "load_split",
    "manifest_text",
    "split_items",
    "training_items",
]

logger = logger_named(__name__)

_VALID_MANIFEST = "valid.jsonl"
_MAX_REPEATED_IN_LOG = 20
_MAX_READERS = 8

AnyDataset = Dataset | HuggingFaceDataset
DataSource = str | Path | AnyDataset | Sequence[str | Path | AnyDataset]
AudioSplit = tuple[Sequence[AudioItem] | AnyDataset, Sequence[AudioItem] | AnyDataset]


@typed
def captions_of(item: AudioItem) -> list[str]:
    """Return the captions of an item without repetitions: `item.caption`, then the texts of the label `captions`."""
    return texts_in([item.caption, *texts_in(item.labels.get("captions"))])


@typed
def load_items(
    source: DataSource, min_seconds: float = 0.0, channels: int = 1, sample_hz: int | None = None
) -> ItemReport:
    """List the audio of a data source, and decode each file to check that it can be used.

    Args:
        source: A folder, a manifest (`.jsonl`, `.json` or `.csv`), a tar archive (see `tar_entries`), a torch `Dataset`
            of waves (see `dataset_items`), a data set of the package `datasets` (see `hf_entries`), or a list of such
            sources. If a folder contains a `train.jsonl`, only the files in this manifest are used. In a folder without
            `train.jsonl`, all audio files are used, also those in subfolders and linked folders, sorted by name, and
            then the members of all tar archives; hidden files are skipped. The captions of `x.wav` may be in `x.txt`,
            one caption per line, in `x.json`, with the fields of a manifest line, or in a `metadata.jsonl` or
            `metadata.csv` of Hugging Face. A line of a manifest is a JSON object with the field `audio` (path relative
            to the manifest, or file:// URL; also called `file_name`), and optionally `caption` and `captions` (see
            `caption_and_labels`). All other fields of a line become labels.
        min_seconds: Minimum duration of an audio file; shorter files are rejected.
        channels: Number of channels of the model (see `Requirements`).
        sample_hz: Sample rate of the waves of a `Dataset` that has no attribute `sample_hz`.

    Returns:
        Usable and rejected files. A warning lists everything that is left out, with the reason. An audio file is used
        even if its caption file cannot be read. If no audio file can be used, a ValueError is raised.
    """
    requirements = Requirements(min_seconds, channels)
    if sample_hz is not None:
        check_rate(sample_hz)
    if isinstance(source, HuggingFaceDataset):
        return _checked_report(hf_entries(source), type(source).__name__, requirements)
    if isinstance(source, Dataset):
        return _report(dataset_items(source, sample_hz), [], type(source).__name__, requirements)
    if not isinstance(source, (str, Path)):
        if not source:
            raise ValueError("got an empty list of data sources; pass at least one folder")
        reports = [load_items(part, min_seconds, channels, sample_hz) for part in source]
        items = _without_repetitions([report.items for report in reports])
        return ItemReport(items, [rejected for report in reports for rejected in report.rejected])
    source = _source_path(source)
    entries, left_out = source_entries(source)
    return check_entries(entries, source, requirements, left_out)


def _source_path(source: str | Path) -> Path:
    return local_path(str(source)).expanduser()


def _identity(item: AudioItem) -> str:
    if item.load is not None:
        return f"{id(item.load)}"
    return os.path.realpath(item.path) if item.open is None else f"{os.path.realpath(item.path)} {item.digest}"


def _warn_of_overlap(train: Sequence[AudioItem], valid: Sequence[AudioItem]) -> None:
    """Log the validation files that are also training files."""
    in_training = {_identity(item) for item in train}
    if common := [printable(item.path) for item in valid if _identity(item) in in_training]:
        shown = ", ".join(common[:_MAX_REPEATED_IN_LOG])
        logger.warning("%d of %d validation files are also training files: %s", len(common), len(valid), shown)


def _without_repetitions(parts: Sequence[Sequence[AudioItem]]) -> list[AudioItem]:
    """Join the items of several sources to one list, in which no file of one source is repeated by another source.

    The files of one source may be repeated, e.g. with different captions.
    """
    known: set[str] = set()
    kept: list[AudioItem] = []
    for part in parts:
        names = [_identity(item) for item in part]
        kept += [item for item, name in zip(part, names) if name not in known]
        if repeated := [printable(item.path) for item, name in zip(part, names) if name in known]:
            shown = ", ".join(repeated[:_MAX_REPEATED_IN_LOG])
            logger.warning("%d files are in several data sources, and are used once: %s", len(repeated), shown)
        known |= set(names)
    return kept


@typed
def check_entries(
    entries: Sequence[ItemEntry],
    source: Path,
    requirements: Requirements | None = None,
    left_out: Sequence[Rejected] = (),
) -> ItemReport:
    """Decode the audio files of `entries` to check that they can be used; messages begin with `source`.

    The files in `left_out` are reported together with the files that cannot be used.
    """
    return _checked_report(entries, str(source), requirements or Requirements(), left_out)


def _checked_report(
    entries: Sequence[ItemEntry | Rejected],
    source: str,
    requirements: Requirements,
    left_out: Sequence[Rejected] = (),
) -> ItemReport:
    with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as readers:
        checked = list(readers.map(_checked, entries))
    return _report(checked, left_out, source, requirements)


def _checked(entry: ItemEntry | Rejected) -> AudioItem | Rejected:
    if isinstance(entry, Rejected):
        return entry
    try:
        with nullcontext() if entry.open is None else entry.open() as source:
            info, digest = decoded_info(entry.path, source), content_digest(entry.path, source)
    except (ValueError, OSError) as error:
        return Rejected(entry.path, str(error).removeprefix(f"{entry.path}: "))
    numbers = (info.sample_hz, info.num_samples, info.channels, digest)
    return AudioItem(entry.path, entry.caption, entry.labels, *numbers, open=entry.open)


def _report(
    checked: Sequence[AudioItem | Rejected], left_out: Sequence[Rejected], source: str, requirements: Requirements
) -> ItemReport:
    """Separate usable from rejected items, and log one warning with everything that is left out."""
    items: list[AudioItem] = []
    rejected: list[Rejected] = []
    for item in checked:
        reason = item.reason if isinstance(item, Rejected) else requirements.reason(item)
        if isinstance(item, AudioItem) and reason is None:
            items.append(item)
        else:
            rejected.append(Rejected(item.path, str(reason)))
    rejected += left_out
    if not items:
        raise ValueError(printable(f"{source}: none of {len(checked)} audio files can be used: {summary_of(rejected)}"))
    if rejected:
        logger.warning("%s: left out %d files: %s", printable(source), len(rejected), summary_of(rejected))
    return ItemReport(items, rejected)


@typed
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


@typed
def split_items(
    items: Sequence[AudioItem], valid_fraction: float = 0.05, seed: int = 0
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
    digest = hashlib.sha256(os.fsencode(f"{seed}:{name}")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@typed
def load_split(
    source: DataSource,
    valid_fraction: float = 0.05,
    seed: int = 0,
    min_seconds: float = 0.0,
    channels: int = 1,
    sample_hz: int | None = None,
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Load the training items and the validation items of a data source (see `load_items` and `split_items`).

    If a folder contains `train.jsonl` and `valid.jsonl`, the two manifests list the training and validation items. The
    sources of a list are split one by one.
    """
    needs = min_seconds, channels, sample_hz
    if not isinstance(source, (str, Path, AnyDataset)):
        splits = [load_split(part, valid_fraction, seed, *needs) for part in source]
        if not splits:
            raise ValueError("got an empty list of data sources; pass at least one folder")
        sides = _without_repetitions([side for split in splits for side in split])
        in_training = {id(item) for train, _ in splits for item in train}
        train = [item for item in sides if id(item) in in_training]
        return train, [item for item in sides if id(item) not in in_training]
    if isinstance(source, (str, Path)):
        manifests = [_source_path(source) / name for name in (TRAIN_MANIFEST, _VALID_MANIFEST)]
        if all(manifest.is_file() for manifest in manifests):
            train, valid = (load_items(manifest, *needs).items for manifest in manifests)
            _warn_of_overlap(train, valid)
            return train, valid
    return split_items(load_items(source, *needs).items, valid_fraction, seed)


@typed
def training_items(
    folder: DataSource | None,
    items: AudioSplit | AnyDataset | None,
    *,
    min_seconds: float = 0.0,
    channels: int = 1,
    sample_hz: int | None = None,
    valid_fraction: float = 0.05,
    reuse_for_validation: bool = True,
    name: str = "folder",
) -> tuple[list[AudioItem], list[AudioItem]]:
    """Return the training and validation items of a trainer, from a data source (see `load_split`) or from items.

    Args:
        folder: Data source, see `load_items`.
        items: Instead of `folder`: training and validation items, or one or two data sets.
        min_seconds: Duration of one token. Files of `folder` that are shorter, or have other channels, are left out;
            items of `items` raise a ValueError.
        channels: Number of channels of the model (see `Requirements`).
        sample_hz: Sample rate of the waves of a `Dataset` that has no attribute `sample_hz`.
        reuse_for_validation: Whether the training items are also used for validation if there are no others.
        name: Name of the argument `folder` in messages.
    """
    if (folder is None) == (items is None):
        both = f"{name} and {name.replace('folder', 'items')}"
        received = f"neither {both.replace(' and ', ' nor ')}" if folder is None else f"both {both}"
        raise ValueError(f"got {received}; pass either a folder (or a manifest) or items")
    needs: dict[str, Any] = dict(min_seconds=min_seconds, channels=channels, sample_hz=sample_hz)
    if isinstance(items, AnyDataset):
        folder, items = items, None
    if folder is not None:
        train, valid = load_split(folder, valid_fraction, **needs)
        return train, valid or list(train if reuse_for_validation else ())
    train, valid = (
        load_items(side, **needs).items if isinstance(side, AnyDataset) else list(side) for side in items or ()
    )
    if not train:
        raise ValueError("got an empty list of training items; pass at least one audio item")
    _warn_of_overlap(train, valid)
    requirements = Requirements(min_seconds, channels)
    reasons = [(item, requirements.reason(item)) for item in (*train, *valid)]
    if unusable := [Rejected(item.path, reason) for item, reason in reasons if reason is not None]:
        raise ValueError(f"{len(unusable)} items cannot be used; remove them: {summary_of(unusable)}")
    return train, valid or list(train if reuse_for_validation else ())
