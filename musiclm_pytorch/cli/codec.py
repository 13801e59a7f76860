"""`musiclm codec encode | decode | evaluate`: a codec on its own, for files and folders."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from musiclm_pytorch.cli.checks import check_file, check_folder, device_named
from musiclm_pytorch.pretrained.bundled import DEFAULT_CODEC, codec_named

if TYPE_CHECKING:
    from torch import Tensor

    from audiolm_pytorch.codecs.base import Codec

__all__ = ["CodecCommand", "Decode", "Encode", "Evaluate", "run_codec"]

SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")
CODES_SUFFIXES = (".safetensors",)


@dataclass(frozen=True, kw_only=True)
class _WithCodec:
    """What every command needs to know of the codec."""

    codec: str = DEFAULT_CODEC
    """Name of a bundled codec, the folder of a codec, or the id of a published one, e.g. facebook/encodec_24khz."""
    offline: bool = False
    """Never ask a model hub."""
    device: str = "auto"
    """Where to compute: cpu, cuda, mps, ... or auto, which takes a GPU if there is one."""

    def opened(self) -> "Codec":
        """The codec."""
        return codec_named(self.codec, device_named(self.device), self.offline)


@dataclass(frozen=True, kw_only=True)
class Encode(_WithCodec):
    """Turn sounds into codes: one small .safetensors file each, of any rate, channels and length."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A sound file, or a folder of them."""
    out: Path
    """File to write (.safetensors); for a folder the folder to write, which gets the same tree."""
    levels: int | None = None
    """Keep only the first code levels; all if not given."""


@dataclass(frozen=True, kw_only=True)
class Decode(_WithCodec):
    """Turn codes back into sounds, with the codec that made them."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A file that `musiclm codec encode` wrote, or a folder of them."""
    out: Path
    """File to write (.wav, .flac or .ogg); for a folder the folder to write, which gets the same tree."""
    levels: int | None = None
    """Decode from the first code levels only; from all that are stored if not given."""
    original_rate: bool = False
    """Resample to the rate of the file that was encoded; otherwise at the codec's rate."""
    suffix: str = ".wav"
    """Kind of the files in a folder: .wav, .flac or .ogg."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(_WithCodec):
    """Measure a codec on sounds: distances to the original, bitrate, use of the codes, speed."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A sound file, or a folder of them."""
    levels: tuple[int, ...] = ()
    """Measure these numbers of code levels too, beside all of them."""
    against: str = ""
    """Other codecs to measure, e.g. opus:6,opus:12 for Opus at 6 and 12 kbps (needs opus-tools)."""
    seconds: float = 30.0
    """At most so much of the beginning of every file."""
    json: Path | None = None
    """Also write the figures into this file (.json)."""


CodecCommand = (
    Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def run_codec(command: Encode | Decode | Evaluate) -> int:
    """Carry a command out.

    Args:
        command: What to do.

    Returns:
        Exit status: 0, or 2 if some files of a folder failed; these are named on standard error, the others are done.

    Raises:
        ValueError: If nothing could be done; says what was wrong and the mend.
    """
    if not command.source.exists():
        raise ValueError(f"{command.source}: no such file or folder")
    match command:
        case Encode():
            return _encode(command)
        case Decode():
            return _decode(command)
        case Evaluate():
            return _evaluate(command)


def _encode(command: Encode) -> int:
    from audiolm_pytorch.codecs.code_file import write_codes
    from audiolm_pytorch.codecs.transcode import FileCodec

    pairs = _pairs(command.source, command.out, SOUND_SUFFIXES, CODES_SUFFIXES)
    files = FileCodec(command.opened())

    def encode(source: Path, target: Path) -> str:
        stored = files.encode(source, command.levels)
        write_codes(target, stored)
        num_frames, num_levels = stored.codes.shape
        return f"{stored.seconds:.2f} s, {num_frames} frames of {num_levels} levels, {stored.kbps:.2f} kbps"

    return _for_each(pairs, encode)


def _decode(command: Decode) -> int:
    from audiolm_pytorch.audio.stream import WRITABLE_SUFFIXES
    from audiolm_pytorch.codecs.code_file import read_codes
    from audiolm_pytorch.codecs.transcode import FileCodec

    if command.suffix not in WRITABLE_SUFFIXES:
        raise ValueError(f"--suffix must be one of {', '.join(WRITABLE_SUFFIXES)}, got {command.suffix}")
    if command.source.is_dir() and command.source.resolve() == command.out.resolve():
        raise ValueError(f"{command.out} may hold the sounds that were encoded; give another --out")
    first, *others = (command.suffix, *(suffix for suffix in WRITABLE_SUFFIXES if suffix != command.suffix))
    pairs = _pairs(command.source, command.out, CODES_SUFFIXES, (first, *others))
    files = FileCodec(command.opened())

    def decode(source: Path, target: Path) -> str:
        stored = read_codes(source)
        files.decode(stored, target, command.levels, command.original_rate)
        sample_hz = stored.info.original_sample_hz if command.original_rate else stored.info.sample_hz
        return f"{stored.seconds:.2f} s at {sample_hz} Hz"

    return _for_each(pairs, decode)


def _pairs(
    source: Path, out: Path, suffixes: Sequence[str], out_suffixes: Sequence[str]
) -> list[tuple[Path, Path | None]]:
    """Every file to read with the file to write; None where another file of the folder already becomes that one."""
    if not source.is_dir():
        check_file(out, out_suffixes)
        return [(source, out)]
    check_folder(out)
    pairs: list[tuple[Path, Path | None]] = []
    taken: set[Path] = set()
    for path in _files_below(source, suffixes):
        target = out / path.relative_to(source).with_suffix(out_suffixes[0])
        pairs.append((path, None if target in taken else target))
        taken.add(target)
    return pairs


def _files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files of a kind below a folder, hidden ones left out, in the order of their names."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    seen = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not seen:
        raise ValueError(f"{folder}: holds no {', '.join(suffixes)} files")
    return seen


def _for_each(pairs: Sequence[tuple[Path, Path | None]], work: Callable[[Path, Path], str]) -> int:
    """Work on files one after another; of a single one the error is raised, of several it is listed."""
    num_failed = 0
    for source, target in pairs:
        try:
            if target is None:
                raise ValueError(f"{source}: another file of this name was done already; rename one of them")
            said = work(source, target)
        except (ValueError, OSError, RuntimeError) as error:
            message = _named(source, error)
            if len(pairs) == 1:
                raise ValueError(message) from error
            _complain(message)
            num_failed += 1
        else:
            sys.stdout.write(f"{target}  {said}\n")
            sys.stdout.flush()
    if len(pairs) > 1:
        sys.stdout.write(f"{len(pairs) - num_failed} of {len(pairs)} files done\n")
    return 2 if num_failed else 0


def _named(path: Path, error: Exception) -> str:
    """What was wrong in one line that names the file."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if str(path) in message else f"{path}: {message}"


def _complain(message: str) -> None:
    sys.stderr.write(f"musiclm: {message}\n")


def _evaluate(command: Evaluate) -> int:
    from audiolm_pytorch.audio.files import read_audio
    from audiolm_pytorch.audio.resample import resample
    from audiolm_pytorch.saving.files import write_json
    from musiclm_pytorch.evaluation.codec_report import codec_report, distance_row, rows_table
    from musiclm_pytorch.evaluation.opus import opus_row

    opus_kbps = _opus_bitrates(command.against)
    if not command.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {command.seconds:g}")
    if command.json is not None:
        check_file(command.json, (".json",))
    paths = _files_below(command.source, SOUND_SUFFIXES) if command.source.is_dir() else [command.source]
    codec = command.opened()

    def read(path: Path) -> "tuple[Tensor, int]":
        return read_audio(path, channels=codec.channels, duration_seconds=command.seconds)

    usable = _readable(paths, read)

    def clips() -> "Iterator[Tensor]":
        return (resample(*read(path), codec.target_sample_hz) for path in usable)

    rate_hz = codec.target_sample_hz
    rows = [
        distance_row("unquantized copy", ((clip, clip) for clip in clips()), rate_hz),
        *codec_report(codec, clips(), (None, *command.levels), name=command.codec),
        *(opus_row((read(path) for path in usable), kbps, rate_hz) for kbps in opus_kbps),
    ]
    sys.stdout.write(
        f"{len(usable)} files, {rows[0].seconds:.0f} s, compared at {rate_hz} Hz; means with 95% intervals\n"
    )
    sys.stdout.write(rows_table(rows))
    if command.json is not None:
        settings = {
            "codec": command.codec,
            "codec_class": type(codec).__name__,
            "codec_fingerprint": codec.fingerprint(),
            "sample_hz": rate_hz,
            "source": str(command.source),
            "num_files": len(usable),
            "most_seconds_a_file": command.seconds,
            "device": command.device,
        }
        write_json(command.json, {"format_version": 1, "settings": settings, "rows": [asdict(row) for row in rows]})
        sys.stdout.write(f"wrote {command.json}\n")
    return 0 if len(usable) == len(paths) else 2


def _readable(paths: Sequence[Path], read: Callable[[Path], object]) -> list[Path]:
    """The files that can be read; the others are listed, unless there is nothing else."""
    usable = []
    complaints = []
    for path in paths:
        try:
            read(path)
            usable.append(path)
        except (ValueError, OSError) as error:
            complaints.append(_named(path, error))
    if not usable:
        more = f" (and {len(complaints) - 1} other files)" if len(complaints) > 1 else ""
        raise ValueError(complaints[0] + more)
    for complaint in complaints:
        _complain(complaint)
    return usable


def _opus_bitrates(against: str) -> list[float]:
    """Bitrates of "opus:6,opus:12" (kbps)."""
    if not against:
        return []
    from musiclm_pytorch.evaluation.opus import check_bitrate, require_opus

    require_opus()
    bitrates = []
    for word in against.split(","):
        kind, _, kbps = word.strip().partition(":")
        try:
            bitrates.append(float(kbps))
        except ValueError:
            kind = ""
        if kind != "opus":
            raise ValueError(f"--against takes words like opus:6 with commas between them, got {word.strip()!r}")
        check_bitrate(bitrates[-1])
    return bitrates
