"""Audio members of tar archives (WebDataset): listed once by their positions, then read like files, in any order."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from audiolm_pytorch.audio.formats import AUDIO_SUFFIXES, OTHER_AUDIO_SUFFIXES
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import SIDECAR_SUFFIXES, caption_and_labels, read_sidecar
from audiolm_pytorch.data.items import ItemEntry, Rejected

__all__ = ["TAR_SUFFIX", "tar_entries"]

TAR_SUFFIX = ".tar"
_BLOCK_BYTES = 512  # of the tar format


@dataclass(frozen=True)
class _Span:
    """Part of a file: the content of a member of an archive. `file_bytes` is the size of the archive."""

    path: Path
    start: int
    num_bytes: int
    file_bytes: int

    def open(self) -> io.IOBase:
        """Open the part as a binary file; raise a ValueError if the archive has another size than when listed."""
        raw = _SpanFile(self)
        num_bytes = raw.file.seek(0, os.SEEK_END)
        if num_bytes != self.file_bytes:
            raw.close()
            raise ValueError(
                f"{self.path}: has {num_bytes} bytes, but {self.file_bytes} bytes when it was listed; restore it, or "
                "start again with the changed data"
            )
        return io.BufferedReader(raw)


class _SpanFile(io.RawIOBase):
    """Binary file that contains only a part of another file."""

    def __init__(self, span: _Span) -> None:
        self.file, self.span, self.position = span.path.open("rb", buffering=0), span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.span.num_bytes}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.span.start + self.position)
        num_read = self.file.readinto(memoryview(buffer)[: max(0, self.span.num_bytes - self.position)]) or 0
        self.position += num_read
        return num_read

    def close(self) -> None:
        self.file.close()
        super().close()


@typed
def tar_entries(archive: Path) -> tuple[list[ItemEntry], list[Rejected]]:
    """List the audio members of an uncompressed tar archive in their order, and the members that are left out.

    Members are grouped to samples by their names up to the first dot, as in WebDataset. The captions and labels of the
    sample `x` are in the members `x.json` and `x.txt`, and those of its audio `x.take.flac` also in `x.take.json` and
    `x.take.txt` (see `read_sidecar`). The audio members have the path `ARCHIVE/MEMBER`.
    """
    members: dict[PurePosixPath, _Span] = {}
    left_out: list[Rejected] = []
    for name, item in _members(archive):
        if isinstance(item, Rejected):
            left_out.append(item)
        elif name in members:
            left_out.append(Rejected(archive / name, "is in the archive twice; the first member is used"))
        else:
            members[name] = item
    audio = [name for name in members if name.suffix.lower() in AUDIO_SUFFIXES]
    sidecars: dict[str, list[PurePosixPath]] = {}
    for name in sorted(name for name in members if name.suffix.lower() in SIDECAR_SUFFIXES):
        sidecars.setdefault(str(name.with_suffix("")), []).append(name)
    used: set[PurePosixPath] = set()
    entries: list[ItemEntry] = []
    for name in audio:
        captions: list[str | None] = []
        labels: dict[str, Any] = {}
        stems = dict.fromkeys([str(name.with_suffix("")), str(name.with_name(name.name.partition(".")[0]))])
        for sidecar in [sidecar for stem in stems for sidecar in sidecars.get(stem, ())]:
            try:
                with members[sidecar].open() as source:
                    caption, further = read_sidecar(archive / sidecar, source)
            except ValueError as error:
                if sidecar not in used:
                    left_out.append(Rejected(archive / sidecar, f"{error}; {name} is used without it"))
            else:
                captions += [caption, *further.pop("captions", ())]
                labels |= further
            used.add(sidecar)
        texts = caption_and_labels(labels | {"captions": captions})
        entries.append(ItemEntry(archive / name, *texts, open=members[name].open))
    alone = {sidecar for names in sidecars.values() for sidecar in names} - used
    left_out += [Rejected(archive / name, "belongs to no audio member") for name in sorted(alone)]
    return entries, left_out


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, _Span | Rejected]]:
    """Yield the names of the audio and caption members of an archive, with their positions or why they are left out."""
    try:
        with tarfile.open(archive, "r:") as tar:
            num_bytes = archive.stat().st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # millions of members would fill the memory
                name = PurePosixPath(member.name)
                if any(part.startswith(".") and part != ".." for part in name.parts):
                    continue  # hidden, such as ._song.wav of macOS
                reason = _reason(name, member)
                span = _Span(archive, member.offset_data, member.size, num_bytes)
                if reason is None and span.start + span.num_bytes > num_bytes:
                    raise tarfile.ReadError(f"the archive ends in the member {name}")
                if reason is not None:
                    yield name, Rejected(archive / name.name, reason)
                elif name.suffix.lower() in (*AUDIO_SUFFIXES, *SIDECAR_SUFFIXES):
                    yield name, span
            with archive.open("rb") as file:
                file.seek(tar.offset)
                if file.read(_BLOCK_BYTES).strip(b"\0"):  # tarfile ends without an error at a damaged header
                    raise tarfile.ReadError(f"no member begins at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = f"cannot be read to its end ({error}); create it again, uncompressed"
        yield PurePosixPath(), Rejected(archive, reason)


def _reason(name: PurePosixPath, member: tarfile.TarInfo) -> str | None:
    """Return why an audio or caption member cannot be used, or None."""
    suffix = name.suffix.lower()
    if suffix in OTHER_AUDIO_SUFFIXES:
        return f"{suffix} cannot be decoded; convert it to .flac, e.g. with ffmpeg"
    if suffix not in (*AUDIO_SUFFIXES, *SIDECAR_SUFFIXES) or member.isdir():
        return None
    if name.is_absolute() or ".." in name.parts:
        return "its name is a path outside of the archive"
    if not member.isreg() or member.issparse():
        return "is not a regular file"
    return None
