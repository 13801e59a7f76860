"""MusicCaps (MusicLM, arXiv:2301.11325): its table of captions, and a folder of the clips that somebody has of them.

The table (google/MusicCaps, `musiccaps-public.csv`) names ten seconds of 5,521 videos; the sound is not part of it, and
some videos are gone, so that every copy of the data set lacks other clips.
"""

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.data.captions import caption_and_labels
from audiolm_pytorch.data.manifest import AudioItem, ItemEntry, ItemReport, Rejected, audio_files, check_entries
from musiclm_pytorch.mulan.captions import parse_aspects

__all__ = ["CaptionedClip", "MusicCapsItems", "musiccaps_items", "read_musiccaps"]

logger = logging.getLogger(__name__)

NEEDED_COLUMNS = ("ytid", "start_s", "end_s", "aspect_list", "caption")
# The published table has 3 MB.
MAX_TABLE_BYTES = 2**28
MAX_NAMED_IN_LOG = 20
# Cutting tools add a fraction of a second; a whole video, of which only ten seconds are described, is far longer.
MAX_EXCESS_SECONDS = 2.0
# Ids are parts of file names: anything else than YouTube's own form could name a file elsewhere.
_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "": None}


@dataclass(frozen=True)
class CaptionedClip:
    """One described stretch of a video.

    Attributes:
        ytid: Id of the video.
        start_seconds: Where in the video it begins.
        end_seconds: Where in the video it ends.
        captions: What is said about it, one text a row of the table.
        aspects: Short phrases about it.
        about: What else the table says, under the names of its columns.
    """

    ytid: str
    start_seconds: float
    end_seconds: float
    captions: tuple[str, ...]
    aspects: tuple[str, ...]
    about: dict[str, Any]

    @property
    def file_names(self) -> tuple[str, ...]:
        """File names, without suffix, under which tools that fetch the clips leave it; the most precise first."""
        start, end = _plain(self.start_seconds), _plain(self.end_seconds)
        return f"[{self.ytid}]-[{start}-{end}]", f"{self.ytid}-{start}", self.ytid


@dataclass(frozen=True)
class MusicCapsItems:
    """What a table and a folder have in common.

    Attributes:
        items: Usable clips, in the order of the table; label `aspects` is a list, `musiccaps` the rest of the row.
        rejected: Clips that are there and cannot be used, with reasons.
        missing: Described clips that are not there.
    """

    items: list[AudioItem]
    rejected: list[Rejected]
    missing: list[CaptionedClip]

    @beartype
    def split(self, column: str) -> tuple[list[AudioItem], list[AudioItem]]:
        """Split the items by a column of the table that is True or False.

        Args:
            column: `is_audioset_eval` (clips of AudioSet's evaluation part) or `is_balanced_subset` (1,000 clips
                balanced over genres).

        Returns:
            Items of which it is not true, and items of which it is.

        Raises:
            ValueError: If the table does not say it of every item.
        """
        sides: tuple[list[AudioItem], list[AudioItem]] = [], []
        for item in self.items:
            side = item.labels["musiccaps"].get(column)
            if not isinstance(side, bool):
                raise ValueError(f"{item.path.name}: column {column!r} of the table must be True or False, got {side}")
            sides[side].append(item)
        return sides


@beartype
def musiccaps_items(table: str | Path, clips: str | Path) -> MusicCapsItems:
    """Join the table of MusicCaps with a folder of clips.

    Args:
        table: `musiccaps-public.csv`, or another table with its columns; rows of the same clip are further captions.
        clips: Folder of audio files (also in folders below), named `{ytid}`, `{ytid}-{start}` or
            `[{ytid}]-[{start}-{end}]`, seconds as in the table; of files of the same name the first is taken.

    Returns:
        The clips that can be used, decoded once, and those that are missing (also logged in one warning each).

    Raises:
        ValueError: If the table is malformed (its line is named), the folder does not exist, or no clip can be used.
    """
    table, clips = Path(table), Path(clips)
    described = read_musiccaps(table)
    files: dict[str, Path] = {}
    for path in audio_files(clips):
        files.setdefault(path.stem, path)
    num_of_video = Counter(clip.ytid for clip in described)
    found: list[tuple[CaptionedClip, Path]] = []
    missing: list[CaptionedClip] = []
    for clip in described:
        # the name of a video alone says nothing where several stretches of it are described
        names = clip.file_names if num_of_video[clip.ytid] == 1 else clip.file_names[:-1]
        there = [files[name] for name in names if name in files]
        if there:
            found.append((clip, there[0]))
        else:
            missing.append(clip)
    if not found:
        first = " or ".join(f"{name}.wav" for name in described[0].file_names)
        raise ValueError(f"{clips}: holds none of the {len(described)} clips of {table}; name the first one {first}")
    if missing:
        told = _told([clip.ytid for clip in missing])
        logger.warning("%s: %d of %d clips of %s are missing: %s", clips, len(missing), len(described), table, told)
    report = check_entries([_entry(clip, path) for clip, path in found], clips)
    return MusicCapsItems(*_without_whole_videos(report, clips), missing)


def _entry(clip: CaptionedClip, path: Path) -> ItemEntry:
    """A clip that is there, as a line of a manifest."""
    # one label for what is not about the music: lone columns such as is_audioset_eval would look like tags
    about = {"ytid": clip.ytid, "start_s": clip.start_seconds, "end_s": clip.end_seconds, **clip.about}
    labels = {"aspects": list(clip.aspects), "musiccaps": about}
    return ItemEntry(path, *caption_and_labels({"captions": list(clip.captions), **labels}))


def _without_whole_videos(report: ItemReport, clips: Path) -> tuple[list[AudioItem], list[Rejected]]:
    """Usable and rejected clips; a file that is far longer than what is described is no clip."""
    items: list[AudioItem] = []
    whole: list[Rejected] = []
    for item in report.items:
        start, end = item.labels["musiccaps"]["start_s"], item.labels["musiccaps"]["end_s"]
        seconds = item.num_samples / item.sample_hz
        if seconds <= end - start + MAX_EXCESS_SECONDS:
            items.append(item)
        else:
            cut = f"lasts {seconds:.1f} s, but {_plain(start)} to {_plain(end)} s are described; cut these out of it"
            whole.append(Rejected(item.path, cut))
    told = _told([f"{item.path} ({item.reason})" for item in whole])
    if not items:
        raise ValueError(f"{clips}: no clip can be used: {told}")
    if whole:
        logger.warning("%s: %d files are longer than their clips and are left out: %s", clips, len(whole), told)
    return items, [*report.rejected, *whole]


@beartype
def read_musiccaps(table: str | Path) -> list[CaptionedClip]:
    """Read the table of MusicCaps.

    Args:
        table: A CSV file with the columns `ytid`, `start_s`, `end_s`, `aspect_list` and `caption`; others are kept.

    Returns:
        Its clips in order; rows about the same stretch of a video are one clip of several captions.

    Raises:
        ValueError: If it is no such table; the message names file and line.
    """
    table = Path(table)
    if not table.is_file():
        raise ValueError(f"{table}: no such file; download musiccaps-public.csv and name it here")
    if table.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"{table}: holds {table.stat().st_size} bytes, a table of captions at most {MAX_TABLE_BYTES}")
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
        raise ValueError(f"{table}: holds no rows")
    return list(clips.values())


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table with the number of their first line; a text in quotes may go over several lines."""
    with table.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{table}, line {line}: no row of a CSV table ({error}); check its quotes") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{table}, behind line {line}: not UTF-8 ({error}); save it as such") from error
            if row is None:
                return
            if not header:
                header = row
                missing = [name for name in NEEDED_COLUMNS if header.count(name) != 1]
                if missing:
                    raise ValueError(
                        f"{table}, line {line}: needs each of the columns {missing} once, got {header[:20]}"
                    )
            elif row:
                if len(row) != len(header):
                    raise ValueError(f"{table}, line {line}: {len(row)} cells, but there are {len(header)} columns")
                yield line, dict(zip(header, row))


def _clip(cells: dict[str, str]) -> CaptionedClip:
    """What a row says."""
    ytid, caption = cells["ytid"], cells["caption"].strip()
    if not _VIDEO_ID.fullmatch(ytid):
        raise ValueError(f"'ytid' must be 11 letters, digits, - or _, got {ytid[:50]!r}")
    try:
        start, end = float(cells["start_s"]), float(cells["end_s"])
    except ValueError:
        start = end = math.nan
    if not 0 <= start < end < math.inf:
        said = f"{cells['start_s'][:20]!r} and {cells['end_s'][:20]!r}"
        raise ValueError(f"'start_s' and 'end_s' must be seconds, the first before the second, got {said}")
    try:
        aspects = parse_aspects(cells["aspect_list"])
    except ValueError as error:
        raise ValueError(f"'aspect_list' is {error}") from error
    if not caption and not aspects:
        raise ValueError("neither a caption nor aspects; remove the row")
    about = {name: _value(name, cell) for name, cell in cells.items() if name not in NEEDED_COLUMNS}
    return CaptionedClip(ytid, start, end, (caption,) if caption else (), tuple(aspects), about)


def _value(name: str, cell: str) -> Any:
    """A cell as what it is: True or False, a number, a list of AudioSet's classes, or a text."""
    if name.startswith("is_"):
        if cell.lower() not in _TRUTHS:
            raise ValueError(f"{name!r} must be True or False, got {cell[:20]!r}")
        return _TRUTHS[cell.lower()]
    if name == "audioset_positive_labels":
        return [label for label in cell.split(",") if label]
    return int(cell) if re.fullmatch("[0-9]{1,9}", cell) else cell


def _plain(seconds: float) -> str:
    """Seconds as the table and file names write them: 30, not 30.0."""
    return str(int(seconds)) if seconds.is_integer() else str(seconds)


def _told(names: Sequence[str]) -> str:
    """Names in a line that stays readable."""
    more = len(names) - MAX_NAMED_IN_LOG
    return ", ".join(names[:MAX_NAMED_IN_LOG]) + (f" and {more} more" if more > 0 else "")
