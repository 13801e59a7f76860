"""Audio items of a data set: their identity, their requirements, and reading of their waves."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.resample import resample, resample_source_span, resampled_length
from audiolm_pytorch.audio.stream import AudioSource
from audiolm_pytorch.audio.waves import with_channels
from audiolm_pytorch.checks.types import typed

__all__ = [
    "AudioItem",
    "ItemEntry",
    "ItemReport",
    "OpenSource",
    "Rejected",
    "Requirements",
    "content_digest",
    "items_digest",
]

_DIGEST_BLOCK_BYTES = 2**14

# Function that opens the encoded audio of an item which is not a file, such as a member of an archive.
OpenSource = Callable[[], io.IOBase]


@dataclass(frozen=True)
class ItemEntry:
    """Path, caption and labels of an audio file that is not checked yet; see `AudioItem`."""

    path: Path
    caption: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    open: OpenSource | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class AudioItem:
    """Audio file that can be decoded, with caption and labels.

    Attributes:
        num_samples: Number of decoded samples per channel.
        channels: Number of channels of the file; None if it is not known.
        digest: `content_digest` of the file; empty if it is not known.
        load: Function that returns the wave `[c, n]` of an item without encoded audio; `path` is then only a name.
        open: Function that opens the encoded audio of an item that is not a file, such as a member of an archive;
            `path` is then only a name.
    """

    path: Path
    caption: str | None
    labels: dict[str, Any]
    sample_hz: int
    num_samples: int
    channels: int | None = None
    digest: str = ""
    load: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)
    open: OpenSource | None = field(default=None, compare=False, repr=False)

    @typed
    def read(
        self,
        sample_hz: int,
        channels: int = 1,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
    ) -> Tensor:
        """Read the wave `[c, n]` of the item, or a part of it, as `read_audio` does.

        If the file has another size or fewer samples than when it was listed, a ValueError names the file.
        """
        total, start = resampled_length(self.num_samples, self.sample_hz, sample_hz), round(start_seconds * sample_hz)
        count = total - start if duration_seconds is None else min(round(duration_seconds * sample_hz), total - start)
        if self.load is not None:
            first, last, skip = resample_source_span(start, count, self.sample_hz, sample_hz)
            wave = resample(with_channels(self.load()[:, first:last], channels), self.sample_hz, sample_hz)[:, skip:]
        elif self.open is not None:
            with self.open() as source:
                self._check_size(source.seek(0, os.SEEK_END))
                wave = read_audio(self.path, sample_hz, channels, start_seconds, duration_seconds, source)[0]
        else:
            if self.path.is_file():
                self._check_size(self.path.stat().st_size)
            wave = read_audio(self.path, sample_hz, channels, start_seconds, duration_seconds)[0]
        if wave.shape[1] < count:
            raise ValueError(self._changed(f"{wave.shape[1]} samples from {start_seconds:g} s, but {count} samples"))
        return wave[:, :count]

    @cached_property
    def text_facts(self) -> str:
        """Caption and labels as JSON for `items_digest`, which is called for the same items by each trainer."""
        texts = [repr(self.caption), repr(sorted(self.labels.items()))] if self.caption or self.labels else []
        return json.dumps(texts)[1:-1]

    def _check_size(self, num_bytes: int) -> None:
        listed = self.digest.partition(":")[0]
        if listed and int(listed) != num_bytes:
            raise ValueError(self._changed(f"{num_bytes} bytes, but {listed} bytes"))

    def _changed(self, change: str) -> str:
        return f"{self.path}: has {change} when it was listed; restore it, or start again with the changed data"


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


@typed
@dataclass(frozen=True)
class Requirements:
    """Requirements for the files of a data set, which are tested when the files are listed.

    Args:
        min_seconds: Minimum duration.
        channels: Number of channels of the model. A model of one channel uses the mean of the channels of any file; a
            model of more channels needs files with as many channels, or mono files.
    """

    min_seconds: float = 0.0
    channels: int = 1

    def __post_init__(self) -> None:
        if not (self.min_seconds >= 0 and self.channels >= 1):
            raise ValueError(f"need min_seconds >= 0 and channels >= 1, got {self.min_seconds} and {self.channels}")

    def reason(self, item: AudioItem) -> str | None:
        """Return why an item cannot be used, or None if it can be used."""
        if item.num_samples < self.min_seconds * item.sample_hz:
            seconds = item.num_samples / item.sample_hz
            return f"too short: {seconds:.3f} s, at least {self.min_seconds} s are needed"
        if self.channels > 1:
            channels = item.channels or AudioSource(item.path, channels=None).info.channels
            if channels not in (1, self.channels):
                return f"has {channels} channels, 1 or {self.channels} are needed; mix the channels down first"
        return None


@typed
def content_digest(path: Path, source: io.IOBase | None = None) -> str:
    """Return the size of a file in bytes, and a hash of three blocks of the file, as `size:hash`.

    Large files are not read whole, because the files of a data set are digested at every start of a run. With an open
    binary file `source`, `path` is not used.
    """
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb", buffering=0) if source is None else nullcontext(source) as file:
        num_bytes = file.seek(0, os.SEEK_END)
        last = max(0, num_bytes - _DIGEST_BLOCK_BYTES)
        for start in sorted({0, last // 2, last}):
            file.seek(start)
            digest.update(file.read(_DIGEST_BLOCK_BYTES))
    return f"{num_bytes}:{digest.hexdigest()}"


@typed
def items_digest(items: Sequence[AudioItem], waves_only: bool = False) -> str:
    """Hash file names, lengths, sample rates, contents, captions and labels of items in order.

    The hash is the identity of the data of a training run. Folders are not part of the hash, because a data set may be
    moved. A training that reads only the waves passes `waves_only`, so that its captions and labels may change.
    """
    facts = []
    for item in items:
        digest = item.digest
        if not digest and item.load is None and item.open is None and item.path.is_file():
            digest = content_digest(item.path)
        wave_facts = json.dumps([item.path.name, item.sample_hz, item.num_samples, digest])[1:-1]
        texts = "" if waves_only else item.text_facts
        facts.append(f"[{wave_facts}, {texts}]" if texts else f"[{wave_facts}]")
    content = f"[{', '.join(facts)}]"
    return f"{len(items)} files, {hashlib.sha256(content.encode()).hexdigest()[:16]}"
