"""Reader of the MusicCaps table of captions (MusicLM, arXiv:2301.11325) and of a folder with MusicCaps clips.

The MusicCaps table (google/MusicCaps, `musiccaps-public.csv`) describes ten seconds of each of 5,521 videos, but
contains no audio. Some of the videos were deleted, so copies of MusicCaps lack clips.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import caption_and_labels
from audiolm_pytorch.data.folder import scan_folder
from audiolm_pytorch.data.items import AudioItem, ItemEntry, ItemReport, Rejected
from audiolm_pytorch.data.manifest import check_entries
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.mulan.captions import parse_aspects

__all__ = ["CaptionedClip", "MusicCapsItems", "musiccaps_items", "read_musiccaps"]

logger = logger_named(__name__)

_NEEDED_COLUMNS = ("ytid", "start_s", "end_s", "aspect_list", "caption")
# The published table has 3 MB.
_MAX_TABLE_BYTES = 2**28
_MAX_NAMES_IN_LOG = 20
# Tools that cut clips add a fraction of a second. A whole video is much longer.
_MAX_EXCESS_SECONDS = 2.0
# Ids are parts of file names; other texts could name a file in another folder.
_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")
# Texts that table tools write for a missing value.
_MISSING = ("", "nan", "none", "null")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, **dict.fromkeys(_MISSING)}


@dataclass(frozen=True)
class CaptionedClip:
    """Clip of a video in the MusicCaps table; `about` has the table columns that no other field contains."""

    ytid: str
    start_seconds: float
    end_seconds: float
    captions: tuple[str, ...]
    aspects: tuple[str, ...]
    about: dict[str, Any]

    @property
    def file_names(self) -> tuple[str, ...]:
        """File names without suffix that download tools use for the clip, the most precise name first."""
        start, end = _plain(self.start_seconds), _plain(self.end_seconds)
        return f"[{self.ytid}]-[{start}-{end}]", f"{self.ytid}_{start}_{end}", f"{self.ytid}-{start}"

    @property
    def video_names(self) -> tuple[str, ...]:
        """File names without suffix of the only clip of a video; yt-dlp writes a title before the second name."""
        return self.ytid, f"[{self.ytid}]"


@dataclass(frozen=True)
class MusicCapsItems:
    """Usable clips of the MusicCaps table in the order of the table, rejected files with reasons, and missing clips.

    The items have the labels `aspects` (a list) and `musiccaps` (the table columns in `CaptionedClip.about`).
    """

    items: list[AudioItem]
    rejected: list[Rejected]
    missing: list[CaptionedClip]

    @typed
    def split(self, column: str) -> tuple[list[AudioItem], list[AudioItem]]:
        """Split the items by a boolean column of the table into (items with False, items with True).

        The boolean columns are `is_audioset_eval` and `is_balanced_subset` (1,000 clips balanced over genres).
        """
        sides: tuple[list[AudioItem], list[AudioItem]] = [], []
        for item in self.items:
            side = item.labels["musiccaps"].get(column)
            if not isinstance(side, bool):
                raise ValueError(f"{item.path.name}: column {column!r} of the table must be True or False, got {side}")
            sides[side].append(item)
        return sides


@typed
def musiccaps_items(table: str | Path, clips: str | Path) -> MusicCapsItems:
    """Find the clips of the MusicCaps table in a folder; raise a ValueError if no clip can be used.

    The files in the folder and its subfolders are named `{ytid}`, `{title} [{ytid}]`, `{ytid}-{start}`,
    `{ytid}_{start}_{end}` or `[{ytid}]-[{start}-{end}]`, with seconds as in the table. If several files have the same
    name, the first file is used.
    """
    table, clips = Path(table), Path(clips)
    described = read_musiccaps(table)
    scan = scan_folder(clips)
    files: dict[str, Path] = {}
    for path in scan.audio:
        for name in _names(path):
            files.setdefault(name, path)
    unreadable = {name: rejected for rejected in scan.rejected for name in _names(rejected.path)}
    left_out: list[Rejected] = []
    num_of_video = Counter(clip.ytid for clip in described)
    found: list[tuple[CaptionedClip, Path]] = []
    missing: list[CaptionedClip] = []
    for clip in described:
        # If several parts of a video are described, the id of the video alone is ambiguous.
        names = clip.file_names + (clip.video_names if num_of_video[clip.ytid] == 1 else ())
        file = next((files[name] for name in names if name in files), None)
        other = next((unreadable[name] for name in names if name in unreadable), None)
        if file is not None:
            found.append((clip, file))
        elif other is not None:
            left_out.append(other)
        else:
            missing.append(clip)
    if not found and not left_out:
        first = " or ".join(f"{name}.wav" for name in described[0].file_names + described[0].video_names)
        raise ValueError(f"{clips}: contains none of the {len(described)} clips of {table}; expected e.g. {first}")
    if missing:
        ids = _list_names([clip.ytid for clip in missing])
        logger.warning("%s: %d of %d clips of %s are missing: %s", clips, len(missing), len(described), table, ids)
    report = check_entries([_entry(clip, path) for clip, path in found], clips, left_out=left_out)
    return MusicCapsItems(*_without_whole_videos(report, clips), missing)


def _names(path: Path) -> list[str]:
    """Return the name of a file without suffix, and an id in brackets at its end, as in `title [id].wav`."""
    return [path.stem, *re.findall(r"\[[\w-]+\]$", path.stem)]


def _entry(clip: CaptionedClip, path: Path) -> ItemEntry:
    """Convert a clip and the path of its file to an entry of a manifest."""
    # The other columns are one label; single columns such as is_audioset_eval would look like tags.
    about = {"ytid": clip.ytid, "start_s": clip.start_seconds, "end_s": clip.end_seconds, **clip.about}
    labels = {"aspects": list(clip.aspects), "musiccaps": about}
    return ItemEntry(path, *caption_and_labels({"captions": list(clip.captions), **labels}))


def _without_whole_videos(report: ItemReport, clips: Path) -> tuple[list[AudioItem], list[Rejected]]:
    """Separate usable from rejected clips; a file that is much longer than the described clip is rejected."""
    items: list[AudioItem] = []
    whole: list[Rejected] = []
    for item in report.items:
        start, end = item.labels["musiccaps"]["start_s"], item.labels["musiccaps"]["end_s"]
        seconds = item.num_samples / item.sample_hz
        if seconds <= end - start + _MAX_EXCESS_SECONDS:
            items.append(item)
        else:
            reason = f"lasts {seconds:.1f} s, but {_plain(start)} to {_plain(end)} s are described; cut these out of it"
            whole.append(Rejected(item.path, reason))
    names = _list_names([f"{item.path} ({item.reason})" for item in whole])
    if not items:
        raise ValueError(f"no clip in {clips} can be used: {names}")
    if whole:
        logger.warning("%s: %d files are longer than their clips and are left out: %s", clips, len(whole), names)
    return items, [*report.rejected, *whole]


@typed
def read_musiccaps(table: str | Path) -> list[CaptionedClip]:
    """Read a CSV table with the columns `ytid`, `start_s`, `end_s`, `aspect_list`, `caption` and possibly others.

    Table rows with equal video and equal times become one clip with several captions.
    """
    table = Path(table)
    if not table.is_file():
        raise ValueError(f"{table}: no such file; download musiccaps-public.csv and pass its path")
    if table.stat().st_size > _MAX_TABLE_BYTES:
        raise ValueError(f"{table}: has {table.stat().st_size} bytes, the limit is {_MAX_TABLE_BYTES}")
    clips: dict[tuple[str, float, float], CaptionedClip] = {}
    for line, cells in _rows(table):
        try:
            clip = _clip(cells)
        except ValueError as error:
            raise ValueError(f"{table}, line {line}: {error}") from error
        key = clip.ytid, clip.start_seconds, clip.end_seconds
        known = clips.get(key, clip)
        captions, aspects = known.captions + clip.captions, known.aspects + clip.aspects
        clips[key] = replace(known, captions=tuple(dict.fromkeys(captions)), aspects=tuple(dict.fromkeys(aspects)))
    if not clips:
        raise ValueError(f"{table}: the table has no rows after the header")
    return list(clips.values())


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the rows of a CSV table, each with the number of its first line; a quoted text may span several lines."""
    with table.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        line = 1
        try:
            columns = list(reader.fieldnames or [])
            missing = [name for name in _NEEDED_COLUMNS if columns.count(name) != 1]
            if columns and missing:
                raise ValueError(f"{table}, line 1: the columns {missing} must occur once each, got {columns[:20]}")
            line = reader.line_num + 1
            for row in reader:
                cells = [cell for cell in row.values() if cell is not None]
                if len(cells) != len(columns) or None in row:
                    raise ValueError(f"{table}, line {line}: got {len(cells)} values, need {len(columns)} as in line 1")
                yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{table}, line {line}: not a row of a CSV table ({error}); check the quotes") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{table}, after line {line}: not UTF-8 ({error}); save the table as UTF-8") from error


def _clip(cells: dict[str, str]) -> CaptionedClip:
    """Convert a row of the MusicCaps table to a clip."""
    ytid, caption = cells["ytid"], "" if cells["caption"].strip().lower() in _MISSING else cells["caption"].strip()
    if not _VIDEO_ID.fullmatch(ytid):
        raise ValueError(f"'ytid' must be 11 letters, digits, - or _, got {ytid[:50]!r}")
    try:
        start, end = float(cells["start_s"]), float(cells["end_s"])
    except ValueError:
        start = end = math.nan
    if not 0 <= start < end < math.inf:
        cells_text = f"{cells['start_s'][:20]!r} and {cells['end_s'][:20]!r}"
        raise ValueError(f"'start_s' and 'end_s' must be seconds, with start before end, got {cells_text}")
    try:
        aspect_list = cells["aspect_list"]
        aspects = parse_aspects("" if aspect_list.strip().lower() in _MISSING else aspect_list)
    except ValueError as error:
        raise ValueError(f"'aspect_list': {error}") from error
    if not caption and not aspects:
        raise ValueError("the row has neither a caption nor aspects; remove it")
    about = {name: _value(name, cell) for name, cell in cells.items() if name not in _NEEDED_COLUMNS}
    return CaptionedClip(ytid, start, end, (caption,) if caption else (), tuple(aspects), about)


def _value(name: str, cell: str) -> Any:
    """Convert a value of the MusicCaps table to a bool, a number, a list of AudioSet classes, or a text."""
    if name.startswith("is_"):
        if cell.lower() not in _TRUTHS:
            raise ValueError(f"{name!r} must be True or False, got {cell[:20]!r}")
        return _TRUTHS[cell.lower()]
    if name == "audioset_positive_labels":
        return [label for label in cell.split(",") if label]
    return int(cell) if re.fullmatch("[0-9]{1,9}", cell) else cell


def _plain(seconds: float) -> str:
    """Format a number of seconds as in the MusicCaps table and in file names (30, not 30.0)."""
    return str(int(seconds)) if seconds.is_integer() else str(seconds)


def _list_names(names: Sequence[str]) -> str:
    """Join the first few names into one line, and append the number of names that are left out."""
    more = len(names) - _MAX_NAMES_IN_LOG
    return ", ".join(names[:_MAX_NAMES_IN_LOG]) + (f" and {more} more" if more > 0 else "")
