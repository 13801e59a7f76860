"""`musiclm codec encode | decode | evaluate`: use a codec on files and folders."""

import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.formats import AUDIO_SUFFIXES, WRITE_SUBTYPES
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.code_file import CODES_MARKS, CodesCompressor, read_codes, write_codes
from audiolm_pytorch.codecs.transcode import SOUND_MARKS, FileCodec
from audiolm_pytorch.data.folder import scan_folder
from audiolm_pytorch.generation.entropy_coder import EntropyCoder
from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.saving.files import write_json
from audiolm_pytorch.saving.ownership import check_overwrite
from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import ModelOptions, check_file, check_folder, device_named
from musiclm_pytorch.evaluation.codec_report import codec_report, rows_table

__all__ = ["Decode", "Encode", "Evaluate"]

_CODES_SUFFIXES = (".safetensors",)
_MAX_REASONS = 3


@dataclass(frozen=True, kw_only=True)
class _WithCodec(ModelOptions, ABC):
    """Options that all `musiclm codec` commands have: input, codec and device."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A sound file (for decode a file written by `musiclm codec encode`), or a folder of them."""
    codec: str = "codec_16khz"
    """Name of a bundled codec, the folder of a codec, or the id of a published one, e.g. facebook/encodec_24khz."""
    device: str = "auto"
    """Device of the codec: cpu, cuda, mps, ... or auto for a GPU if there is one."""

    def open_codec(self) -> Codec:
        """Load the selected codec onto the selected device."""
        return Codec.from_pretrained(**self.source_of(self.codec), device=device_named(self.device))

    def entropy_coder(self, name: str | None, codec: Codec) -> CodesCompressor | None:
        """Load the entropy model with this name, and check that it was trained on codes of `codec`."""
        if name is None:
            return None
        model = EntropyTransformer.from_pretrained(**self.source_of(name))
        check_compatible(model, codec=codec)
        return EntropyCoder(model)

    def execute(self) -> int:
        """Check that the input exists, run the command and return its exit status."""
        if not self.source.exists():
            raise ValueError(f"{self.source}: no such file or folder; give sounds, or files of codes to decode")
        return self.run()

    @abstractmethod
    def run(self) -> int:
        """Run the command and return its exit status."""


@dataclass(frozen=True, kw_only=True)
class Encode(_WithCodec):
    """Encode sounds of any sample rate, channel count and length to one .safetensors file of codes per sound."""

    out: Path
    """File to write (.safetensors); for a folder the folder to write, with the same tree."""
    levels: int | None = None
    """Keep only the first code levels; default: all."""
    entropy: str | None = None
    """Shorten the codes with this entropy model: a folder that EntropyTransformerTrainer wrote."""

    def run(self) -> int:
        """Encode the files and return the exit status."""
        return _encode(self)


@dataclass(frozen=True, kw_only=True)
class Decode(_WithCodec):
    """Decode files of codes to sounds, with the codec that encoded the sounds."""

    out: Path
    """File to write (.wav, .flac, .ogg or .mp3); for a folder the folder to write, with the same tree."""
    levels: int | None = None
    """Decode only the first code levels; default: all stored levels."""
    entropy: str | None = None
    """Folder of the entropy model that encoded the sounds, if they were encoded with one."""
    original_rate: bool = False
    """Resample to the rate of the encoded file; default: the codec's rate."""
    suffix: str | None = None
    """Format of the files in a folder: .wav (the default), .flac, .ogg or .mp3. A single file has that of --out."""

    def run(self) -> int:
        """Decode the files and return the exit status."""
        return _decode(self)


@dataclass(frozen=True, kw_only=True)
class Evaluate(_WithCodec):
    """Measure a codec on sounds: distance between decoded and original sound, bitrate, and codebook usage."""

    levels: tuple[int, ...] = ()
    """Numbers of code levels to measure besides all levels."""
    seconds: float = 30.0
    """Measure at most this much of the beginning of every file."""
    json: Path | None = None
    """Also write the results into this file (.json)."""

    def run(self) -> int:
        """Measure the codec on the files and return the exit status."""
        return _evaluate(self)


def _encode(command: Encode) -> int:
    pairs = _pairs(command.source, command.out, _sounds_in, _CODES_SUFFIXES)
    file_codec = FileCodec(command.open_codec())
    entropy_coder = command.entropy_coder(command.entropy, file_codec.codec)

    def encode(source: Path, target: Path) -> str:
        stored = file_codec.encode(source, command.levels)
        coded_kbps = 8 * write_codes(target, stored, entropy_coder) / stored.seconds / 1000
        num_frames, num_levels = stored.codes.shape
        file_kbps = 8 * target.stat().st_size / stored.seconds / 1000
        entropy_coded = "" if entropy_coder is None else f", {coded_kbps:.2f} kbps entropy-coded"
        return (
            f"{stored.seconds:.2f} s, {num_frames} frames of {num_levels} levels, {stored.kbps:.2f} kbps of codes"
            f"{entropy_coded}, {file_kbps:.2f} kbps as a file"
        )

    return _for_each(pairs, encode, CODES_MARKS)


def _decode(command: Decode) -> int:
    suffix = command.suffix or ".wav"
    if suffix not in WRITE_SUBTYPES:
        raise ValueError(f"--suffix must be one of {', '.join(WRITE_SUBTYPES)}, got {command.suffix}")
    if command.suffix is not None and not command.source.is_dir() and command.out.suffix.lower() != suffix:
        raise ValueError(
            f"--suffix {suffix} is for a folder of files, and --out is the file {command.out}; leave out --suffix, or "
            f"pass --out {command.out.with_suffix(suffix)}"
        )
    if command.source.is_dir() and command.source.resolve() == command.out.resolve():
        raise ValueError(f"--out {command.out} is the input folder, where sounds may be overwritten; use another --out")
    pairs = _pairs(command.source, command.out, _codes_in, [*dict.fromkeys((suffix, *WRITE_SUBTYPES))])
    file_codec = FileCodec(command.open_codec())
    entropy_coder = command.entropy_coder(command.entropy, file_codec.codec)

    def decode(source: Path, target: Path) -> str:
        stored = read_codes(source, entropy_coder)
        file_codec.decode(stored, target, command.levels, command.original_rate)
        sample_hz = stored.info.original_sample_hz if command.original_rate else stored.info.sample_hz
        return f"{stored.seconds:.2f} s at {sample_hz} Hz"

    return _for_each(pairs, decode, SOUND_MARKS)


def _evaluate(command: Evaluate) -> int:
    if not 0 < command.seconds < float("inf"):
        raise ValueError(f"--seconds must be above 0 and finite, got {command.seconds:g}")
    if command.json is not None:
        check_file(command.json, (".json",))
        check_overwrite(command.json, ("format_version", "settings", "rows"))
    paths = _sounds_in(command.source) if command.source.is_dir() else [command.source]
    codec = command.open_codec()
    sample_hz = codec.target_sample_hz

    def clips() -> Iterator[Tensor]:
        for path in paths:
            try:
                clip = read_audio(path, channels=codec.channels, duration_seconds=command.seconds)
            except (ValueError, OSError) as error:
                _fail(path, error, is_only_file=len(paths) == 1)
            else:
                yield resample(*clip, sample_hz)

    rows = codec_report(codec, clips(), (None, *command.levels), name=command.codec)
    num_files = rows[0].num_clips
    # Unlike `sys.stdout.write`, `print` works with a closed standard output, which is None.
    print(f"{num_files} files, {rows[0].seconds:.0f} s, compared at {sample_hz} Hz; means with 95% intervals")
    print(rows_table(rows), end="")
    if command.json is not None:
        settings = {
            "codec": command.codec,
            "codec_class": type(codec).__name__,
            "codec_fingerprint": codec.fingerprint(),
            "sample_hz": sample_hz,
            "source": str(command.source),
            "num_files": num_files,
            "max_seconds_per_file": command.seconds,
            "device": command.device,
        }
        write_json(command.json, {"format_version": 2, "settings": settings, "rows": [asdict(row) for row in rows]})
        print(f"wrote {printable(command.json)}")
    return 0 if num_files == len(paths) else 2


def _pairs(
    source: Path, out: Path, files_in: Callable[[Path], list[Path]], out_suffixes: Sequence[str]
) -> list[tuple[Path, Path | None]]:
    """List the pairs (input file, output file); the output file is None if an earlier pair has the same output.

    The outputs of `x.wav` and `x.mp3` in one folder keep the whole name, as in `x.wav.safetensors`.
    """
    if not source.is_dir():
        check_file(out, out_suffixes)
        return [(source, out)]
    check_folder(out)
    names = [path.relative_to(source) for path in files_in(source)]
    num_of_name = Counter(str(name.with_suffix("")).lower() for name in names)
    pairs: list[tuple[Path, Path | None]] = []
    targets: set[str] = set()
    for name in names:
        is_alone = num_of_name[str(name.with_suffix("")).lower()] == 1
        target = out / (name.with_suffix(out_suffixes[0]) if is_alone else f"{name}{out_suffixes[0]}")
        pairs.append((source / name, None if str(target).lower() in targets else target))
        targets.add(str(target).lower())
    return pairs


def _sounds_in(folder: Path, suffixes: tuple[str, ...] = AUDIO_SUFFIXES) -> list[Path]:
    """List the files below a folder with these suffixes, as for training, and print what is left out."""
    scan = scan_folder(folder, suffixes)
    if not scan.audio:
        reasons = "".join(f"; {rejected.path}: {rejected.reason}" for rejected in scan.rejected[:_MAX_REASONS])
        raise ValueError(f"{folder}: contains no {', '.join(suffixes)} files{reasons}")
    for rejected in scan.rejected:
        sys.stderr.write(f"musiclm: left out {printable(rejected.path)}: {printable(rejected.reason)}\n")
    return list(scan.audio)


def _codes_in(folder: Path) -> list[Path]:
    """List the files of codes below a folder as `_sounds_in` does."""
    return _sounds_in(folder, _CODES_SUFFIXES)


def _for_each(
    pairs: Sequence[tuple[Path, Path | None]], work: Callable[[Path, Path], str], marks: Sequence[str]
) -> int:
    """Call `work` for every pair (input, output), print the returned summaries, and return the exit status.

    An output that exists already is replaced only if it has the `marks` of files of this command (see `is_own`).
    """
    num_failed = 0
    for source, target in pairs:
        try:
            if target is None:
                raise ValueError(f"{source}: another input file has the same output name; rename one of the two files")
            check_overwrite(target, marks)
            summary = work(source, target)
        except (ValueError, OSError, RuntimeError) as error:
            _fail(source, error, is_only_file=len(pairs) == 1)
            num_failed += 1
        else:
            print(f"{printable(target)}  {summary}", flush=True)
    if len(pairs) > 1:
        print(f"{len(pairs) - num_failed} of {len(pairs)} files done")
    return 2 if num_failed else 0


def _fail(path: Path, error: Exception, is_only_file: bool) -> None:
    """Report an error with `path` in one line: raise a ValueError if `path` is the only file, else print the line."""
    message = " ".join(str(error).split()) or type(error).__name__
    message = printable(message if str(path) in message else f"{path}: {message}")
    if is_only_file:
        raise ValueError(message) from error
    sys.stderr.write(f"musiclm: {message}\n")
