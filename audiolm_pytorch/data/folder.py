"""Search of a folder for audio files, caption files, archives and Hugging Face tables."""

import os
from dataclasses import dataclass
from pathlib import Path

from audiolm_pytorch.audio.formats import AUDIO_SUFFIXES, OTHER_AUDIO_SUFFIXES
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import SIDECAR_SUFFIXES
from audiolm_pytorch.data.items import Rejected
from audiolm_pytorch.data.tars import TAR_SUFFIX

__all__ = ["FolderScan", "scan_folder"]

# Tables of captions in the format "AudioFolder" of Hugging Face datasets.
_TABLE_NAMES = ("metadata.jsonl", "metadata.csv")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# A folder `samples` beside one of these files belongs to a training run.
_RUN_FILES, _SAMPLES = ("metrics.jsonl", "run.json"), "samples"
# Folders of `musiclm evaluate music`, whose clips are listed in a manifest with this name.
_EVALUATED, _CLIP_MANIFEST = ("codec_copies", "generated"), "manifest.jsonl"


@dataclass(frozen=True)
class FolderScan:
    """Files below a folder, sorted by path: audio files with their caption files, archives, tables, files left out.

    `unused` lists tables and text files that look like captions, but belong to no audio file.
    """

    audio: dict[Path, list[Path]]
    archives: list[Path]
    tables: list[Path]
    rejected: list[Rejected]
    unused: list[Path]


@typed
def scan_folder(folder: Path, suffixes: tuple[str, ...] = AUDIO_SUFFIXES, archives: bool = False) -> FolderScan:
    """Find the files with these suffixes below a folder, each with its `.json` and `.txt` caption files.

    With `archives`, tar files are listed too; otherwise they are left out, as compressed archives are.

    Hidden files are skipped. Links to folders are followed, but each folder is searched once. Audio that cannot be
    decoded by its suffix, links without a target, folders that cannot be read, the samples of training runs and the
    clips of evaluations are left out with a reason.
    """
    if not folder.is_dir():
        reason = (
            "is a file; pass its folder, or a .jsonl manifest" if folder.is_file() else "no such folder or manifest"
        )
        raise ValueError(f"{folder}: {reason}")
    search = _Search(folder, suffixes, archives)
    sidecars: dict[Path, list[Path]] = {}
    for sidecar in sorted(search.sidecars):
        sidecars.setdefault(sidecar.with_suffix(""), []).append(folder / sidecar)
    described = {path.with_suffix("") for path in search.audio}
    alone = [path for stem, paths in sidecars.items() if stem not in described for path in paths]
    return FolderScan(
        audio={folder / path: sidecars.get(path.with_suffix(""), []) for path in sorted(search.audio)},
        archives=[folder / path for path in sorted(search.archives)],
        tables=[folder / path for path in sorted(search.tables)],
        rejected=[Rejected(folder / path, reason) for path, reason in sorted(search.rejected.items())],
        unused=sorted([*alone, *(folder / path for path in search.unknown_tables)]),
    )


class _Search:
    """Paths below a folder, relative to the folder. Linked folders are searched after all other folders."""

    def __init__(self, root: Path, suffixes: tuple[str, ...], use_archives: bool) -> None:
        self.root, self.suffixes, self.use_archives = root, suffixes, use_archives
        self.archives: list[Path] = []
        self.audio: list[Path] = []
        self.sidecars: list[Path] = []
        self.tables: list[Path] = []
        self.unknown_tables: list[Path] = []
        self.rejected: dict[Path, str] = {}
        self.searched: dict[tuple[int, int], Path] = {}
        self.links: list[Path] = []
        self._walk(Path())
        while self.links:
            self.links.sort()
            self._walk(self.links.pop(0))

    def _walk(self, first: Path) -> None:
        waiting = [first]
        while waiting:
            place = waiting.pop()
            status = (self.root / place).stat()
            known = self.searched.setdefault((status.st_dev, status.st_ino), place)
            if known != place:
                self.rejected[place] = f"a link to the folder {self.root / known}, whose files are listed already"
                continue
            try:
                with os.scandir(self.root / place) as entries:
                    waiting += self._folders_in(place, sorted(entries, key=lambda entry: entry.name))
            except OSError as error:
                self.rejected[place] = f"the folder cannot be read ({error.strerror})"

    def _folders_in(self, place: Path, entries: list["os.DirEntry[str]"]) -> list[Path]:
        """Sort the files of a folder by kind, and return its subfolders."""
        folders = []
        is_run = any(entry.name in _RUN_FILES for entry in entries)
        for entry in entries:
            if entry.name.startswith("."):  # hidden: macOS "._song.wav", and unfinished files of this library
                continue
            path = place / entry.name
            try:
                if entry.is_symlink() and not (self.root / path).exists():
                    self.rejected[path] = "the link points to a missing file or to itself"
                elif entry.is_file():
                    self._add_file(path)
                elif is_run and entry.name == _SAMPLES:
                    self.rejected[path] = "samples of a training run"
                elif entry.name in _EVALUATED and (self.root / path / _CLIP_MANIFEST).is_file():
                    self.rejected[path] = "clips of an evaluation"
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_dir():
                    self.links.append(path)
                elif path.suffix.lower() in self.suffixes:
                    self.rejected[path] = "is not a regular file"
            except OSError as error:
                self.rejected[path] = f"cannot be read ({error.strerror})"
        return folders

    def _add_file(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if path.name in _TABLE_NAMES:
            self.tables.append(path)
        elif suffix in self.suffixes:
            self.audio.append(path)
        elif suffix == TAR_SUFFIX and self.use_archives:
            self.archives.append(path)
        elif suffix == TAR_SUFFIX or path.name.lower().endswith(_COMPRESSED_TARS):
            advice = "unpack it" if suffix == TAR_SUFFIX else "decompress it to .tar"
            self.rejected[path] = f"is an archive; {advice}"
        elif suffix in SIDECAR_SUFFIXES:
            self.sidecars.append(path)
        elif suffix in _TABLE_SUFFIXES:
            self.unknown_tables.append(path)
        elif suffix in OTHER_AUDIO_SUFFIXES:
            advice = "download the file again" if suffix == ".part" else "convert it to .wav or .flac, e.g. with ffmpeg"
            self.rejected[path] = f"{suffix} cannot be decoded; {advice}"
