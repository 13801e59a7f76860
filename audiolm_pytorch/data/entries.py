"""Audio of folders, JSON or CSV manifests and archives, with captions and labels, before it is checked."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import caption_and_labels, manifest_rows, read_sidecar, texts_in, use_text_as_caption
from audiolm_pytorch.data.folder import scan_folder
from audiolm_pytorch.data.items import ItemEntry, Rejected
from audiolm_pytorch.data.tars import TAR_SUFFIX, tar_entries
from audiolm_pytorch.saving.text import logger_named, printable

__all__ = ["TRAIN_MANIFEST", "local_path", "source_entries", "summary_of"]

logger = logger_named(__name__)

TRAIN_MANIFEST = "train.jsonl"
_MANIFEST_SUFFIXES = (".jsonl", ".json", ".csv")
# Fields with the path of the audio: of this library, of Hugging Face's AudioFolder, and of NeMo.
_PATH_FIELDS = ("audio", "file_name", "audio_filepath")
_MAX_REJECTED_SHOWN, _MAX_UNUSED_SHOWN = 200, 5


@typed
def source_entries(source: Path) -> tuple[list[ItemEntry], list[Rejected]]:
    """List the audio of a folder, a manifest or a tar archive, and the files that are left out."""
    if source.is_dir() or source.suffix.lower() not in (*_MANIFEST_SUFFIXES, TAR_SUFFIX):
        manifest = source / TRAIN_MANIFEST
        return (_manifest_entries(manifest), []) if manifest.is_file() else _folder_entries(source)
    if source.suffix.lower() != TAR_SUFFIX:
        return _manifest_entries(source), []
    if not source.is_file():
        raise ValueError(f"{source}: the archive does not exist; pass an existing .tar file")
    entries, left_out = tar_entries(source)
    if not entries:
        raise ValueError(printable(f"{source}: the archive has no audio files: {summary_of(left_out)}"))
    return entries, left_out


def _folder_entries(folder: Path) -> tuple[list[ItemEntry], list[Rejected]]:
    """List the audio files below a folder with their captions, and the files that are left out."""
    scan = scan_folder(folder, archives=True)
    left_out = list(scan.rejected)
    if scan.unused:
        shown = ", ".join(printable(path.relative_to(folder)) for path in scan.unused[:_MAX_UNUSED_SHOWN])
        more = f" and {len(scan.unused) - _MAX_UNUSED_SHOWN} more" if len(scan.unused) > _MAX_UNUSED_SHOWN else ""
        logger.warning(
            "%s: not read: %s%s; captions of x.wav belong in x.txt, x.json or metadata.csv, a manifest is train.jsonl",
            *(printable(folder), shown, more),
        )
    archived: list[ItemEntry] = []
    for archive in scan.archives:
        members, unusable = tar_entries(archive)
        archived += members
        left_out += unusable
    if not scan.audio and not archived:
        reason = f": {summary_of(left_out)}" if left_out else ""
        raise ValueError(printable(f"{folder}: the folder has no audio files and no {TRAIN_MANIFEST}{reason}"))
    rows: dict[Path, dict[str, Any]] = {}
    for table in scan.tables:
        try:
            described = _joined_rows(_rows(table, folder_of_table=True))
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{table}: ")
            left_out.append(Rejected(table, f"{reason}; fix or delete it, the audio files are used without it"))
            continue
        left_out += [Rejected(path, f"no such file, described in {table}") for path in described.keys() - scan.audio]
        rows |= described
    entries = []
    for path, sidecars in scan.audio.items():
        labels = dict(rows.get(path, {}))
        captions: list[str | None] = [*_pop_captions(labels)]
        for sidecar in sidecars:
            try:
                caption, further = read_sidecar(sidecar)
            except (ValueError, OSError) as error:
                left_out.append(Rejected(sidecar, f"{error}; fix or delete it, {path.name} is used without it"))
                continue
            captions += [caption, *further.pop("captions", ())]
            labels |= further
        entries.append(ItemEntry(path, *caption_and_labels(labels | {"captions": captions})))
    return entries + archived, left_out


def _joined_rows(rows: Iterable[tuple[Path, dict[str, Any]]]) -> dict[Path, dict[str, Any]]:
    """Join the rows of each file, which may have several captions, but not several values of a label."""
    joined: dict[Path, dict[str, Any]] = {}
    for path, fields in rows:
        known = joined.setdefault(path, {"captions": []})
        captions = [*known["captions"], *_pop_captions(fields)]
        if differing := [name for name in known.keys() & fields.keys() if known[name] != fields[name]]:
            raise ValueError(f"two rows of {path.name} have different {sorted(differing)}; write one row")
        known |= {**fields, "captions": captions}
    return joined


def _pop_captions(fields: dict[str, Any]) -> list[str]:
    return [*texts_in(fields.pop("caption", None)), *texts_in(fields.pop("captions", None))]


def _manifest_entries(manifest: Path) -> list[ItemEntry]:
    if not manifest.is_file():
        raise ValueError(f"{manifest}: the manifest does not exist; pass an existing .jsonl file")
    entries = [ItemEntry(path, *caption_and_labels(fields)) for path, fields in _rows(manifest)]
    if not entries:
        raise ValueError(f"{manifest}: the manifest has no lines; write one JSON object per audio file")
    return entries


def _rows(manifest: Path, folder_of_table: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the path and the other, checked fields of each row of a manifest.

    In a table of Hugging Face, the field `text` is the caption if there is no other caption.
    """
    for place, fields in manifest_rows(manifest):
        try:
            if not any(name in fields for name in _PATH_FIELDS):
                hint = "; separate the columns with commas" if manifest.suffix.lower() == ".csv" else ""
                raise ValueError(f"needs the field 'audio' (or 'file_name'), got {ascii(list(fields))[:100]}{hint}")
            audio = next(fields.pop(name) for name in _PATH_FIELDS if name in fields)
            if not isinstance(audio, str) or not audio:
                raise ValueError(f"the field 'audio' must be a path, got {ascii(audio)[:100]}")
            if folder_of_table:
                use_text_as_caption(fields)
            caption_and_labels(fields)
            yield manifest.parent / local_path(audio), fields
        except ValueError as error:
            raise ValueError(f"{manifest}, {place}: {error}") from error


def local_path(text: str) -> Path:
    """Convert a path or a file:// URL to a path; raise a ValueError for an address in the network."""
    if "://" not in text[:12] and not text.startswith("file:/"):
        return Path(text)
    url = urlsplit(text)
    if url.scheme.lower() != "file":
        raise ValueError(f"{text[:200]} is an address; download the file, and pass its path")
    return Path(url2pathname(url.path))


def summary_of(rejected: Sequence[Rejected]) -> str:
    """Format rejected files and their reasons as one line of limited length."""
    shown = [printable(f"{item.path} ({item.reason})") for item in rejected[:_MAX_REJECTED_SHOWN]]
    more = len(rejected) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
