"""`musiclm generate`: music from a text."""

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import ModelOptions, check_file, device_named

if TYPE_CHECKING:
    from torch import Tensor

    from musiclm_pytorch.musicgen.musicgen import GeneratedMusic, MusicGen
    from musiclm_pytorch.musiclm import MusicChunk, MusicLM

__all__ = ["Generate"]

_AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
_STREAM_SUFFIXES = (".wav", ".raw")
_STANDARD_OUTPUT = Path("-")
_UNKNOWN_SIZE = 0xFFFFFFFF
_MAX_SECONDS, _LAST_SECONDS = 3600, 5.0
_MAX_COMMENT_LETTERS = 400


@dataclass(frozen=True)
class Generate(ModelOptions):
    """Generate music from a text. MuLaN ranks the candidates, and the best candidate is written."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ""
    """Description of the music, e.g. "a fast jig played on the flute"."""
    story: Path | None = None
    """Instead of TEXT: file with a line for each part of the music, its start in seconds and its text, e.g.
    "15 a slow waltz". The first start is 0."""
    mix: tuple[tuple[float, str], ...] = ()
    """Further texts or audio files to mix with TEXT, each after its weight; TEXT has the weight 1. An example is
    --mix 0.5 "a slow cello" 0.2 drums.wav."""
    negative: str | None = None
    """Text from which the music is led away, e.g. "drums". Needs a guidance scale above 1."""
    guidance_scale: float | None = None
    """Strength of the text in the semantic and the coarse stage; 1 is no guidance. By default that of the model."""
    model: str = "tiny"
    """Name of a bundled model, the folder of a trained one, or a hub id. MusicGen and AudioGen models, for example
    facebook/musicgen-small, generate one piece without ranking."""
    seconds: float | None = None
    """Length in seconds, rounded up to whole frames. By default 5, or with --story 5 after the last start."""
    num_samples: int = 4
    """Number of candidates."""
    seed: int = 0
    """Candidate i is sampled with seed + i. The same command generates the same music."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... or auto, which selects a GPU if there is one."""
    continue_from: Path | None = None
    """Audio file to continue, of any sample rate. Its length counts towards --seconds."""
    melody: Path | None = None
    """Audio file whose melody the music follows, for MusicGen models with a melody."""
    out: Path = Path("music.wav")
    """File to write (.wav, .flac or .ogg; with --stream .wav or .raw, or - for standard output). A missing folder is
    created. Without --stream, the comment field of the file has the text, the model and the seed."""
    stream: bool = False
    """Write 16-bit samples while the music is generated. MuLaN then ranks about the first --rank-seconds of each
    candidate, and only the best candidate is continued; samples outside -1..1 are clipped."""
    rank_seconds: float = 3.0
    """With --stream: length of the first part that is ranked. --num-samples 1 starts without ranking."""
    raw: bool = False
    """With --stream: write no WAV header, only little-endian samples. A file that ends in .raw never has a header."""
    plot: Path | None = None
    """Plot the wave and its mel spectrogram into this picture file (needs the [plot] extra)."""

    def execute(self) -> int:
        """Write the best candidate to a file and print the similarity of each candidate to the text."""
        _check(self)

        from musiclm_pytorch.musicgen.published import is_musicgen

        source, device = self.source_of(self.model), device_named(self.device)
        if is_musicgen(**source):
            from musiclm_pytorch.musicgen.musicgen import MusicGen

            self._generate_musicgen(MusicGen.from_pretrained(**source, device=device))
            return 0
        if self.melody is not None:
            raise ValueError(f"--melody needs a MusicGen model with a melody, {self.model} is none")
        from musiclm_pytorch.musiclm import MusicLM

        musiclm = MusicLM.from_pretrained(**source, device=device)
        if self.stream:
            self._stream(musiclm)
        else:
            self._generate(musiclm)
        return 0

    def _generate_musicgen(self, musicgen: "MusicGen") -> None:
        """Write the music of a MusicGen to a file, or chunk by chunk."""
        if self.mix or any(option is not None for option in (self.story, self.negative, self.guidance_scale)):
            raise ValueError(
                f"--story, --mix, --negative and --guidance-scale need a MusicLM, {self.model} is a MusicGen"
            )
        request: dict[str, Any] = {
            "texts": self.text,
            "seconds": self._seconds,
            "seeds": self.seed,
            "prompt": self.continue_from,
            "melody": self.melody,
        }
        if self.stream:
            self._write_chunks(musicgen.stream(**request))
        else:
            self._write_music(musicgen.generate(**request, progress=True).waves[0], musicgen.sample_hz, 0)

    def _generate(self, musiclm: "MusicLM") -> None:
        """Write the best candidate of a MusicLM to a file."""
        candidates = musiclm(**self._request(), return_all=True, progress=True)
        best = int(candidates.order[0, 0])
        scores = candidates.scores[0].tolist()
        self._write_music(candidates.waves[0, best], candidates.sample_hz, best, scores)

    def _write_music(self, wave: "Tensor", sample_hz: int, best: int, scores: Sequence[float] = ()) -> None:
        """Write a wave and its plot; `best` is the number of the selected candidate of those with `scores`."""
        from audiolm_pytorch.audio.files import write_audio

        if not wave.isfinite().all():
            raise self._nan_error()
        write_audio(self.out, wave, sample_hz, comment=self._comment(best))
        self._report(scores, best)
        self._print(f"wrote {self.out}")
        if self.plot is not None:
            from musiclm_pytorch.evaluation.plots import plot_wave

            plot_wave(wave, sample_hz, self.plot, title=self._title)
            self._print(f"wrote {self.plot}")

    def _request(self) -> dict[str, Any]:
        """Return the arguments of `MusicLM.forward` and `MusicLM.stream`."""
        from musiclm_pytorch.generation.prompts import Mixture

        guidance = {"guidance_scale": self.guidance_scale}
        parts = [(Path(part) if Path(part).is_file() else part, weight) for weight, part in self.mix]
        story = [(start, Mixture([(text, 1.0), *parts]) if parts else text) for start, text in self._starts]
        return {
            "text": story,
            "negative_text": self.negative,
            "num_samples": self.num_samples,
            "seconds": self._seconds,
            "seed": self.seed,
            "prime_wave": self.continue_from,
            "sampling": None if self.guidance_scale is None else dict.fromkeys(("semantic", "coarse"), guidance),
        }

    def _stream(self, musiclm: "MusicLM") -> None:
        """Write the music chunk by chunk, and print the scores of the candidates after the first chunk."""
        chunks = musiclm.stream(**self._request(), rank_seconds=self.rank_seconds)
        first = next(chunks)
        if first.scores is not None:
            self._report(first.scores[0].tolist(), first.seeds[0] - self.seed)
        self._write_chunks(chain([first], chunks))

    def _write_chunks(self, chunks: "Iterator[MusicChunk | GeneratedMusic]") -> None:
        """Write the first wave of every chunk as soon as the chunk is generated."""
        first = next(chunks)  # before the file is created
        channels = len(first.waves[0]) if first.waves[0].ndim == 2 else 1
        has_header = not self.raw and self.out.suffix.lower() != ".raw"
        to_file = self.out != _STANDARD_OUTPUT
        if to_file:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out if to_file else sys.stdout.fileno(), "wb", closefd=to_file) as file:
            if has_header:
                file.write(_wav_header(first.sample_hz, channels, None))
            num_bytes = 0
            for chunk in chain([first], chunks):
                wave = chunk.waves[0]
                if not wave.isfinite().all():
                    raise self._nan_error()
                samples = (wave.clamp(-1, 1) * 32767).round().cpu().numpy()
                num_bytes += file.write(samples.T.astype("<i2").tobytes())
                file.flush()
            if has_header and to_file and file.seekable():
                file.seek(0)
                file.write(_wav_header(first.sample_hz, channels, num_bytes))
        self._print(f"wrote {self.out if to_file else 'standard output'}")

    @property
    def _starts(self) -> list[tuple[float, str]]:
        """The texts, each with its start in seconds."""
        return [(0.0, self.text)] if self.story is None else _read_story(self.story)

    @property
    def _seconds(self) -> float:
        return self._starts[-1][0] + _LAST_SECONDS if self.seconds is None else self.seconds

    @property
    def _title(self) -> str:
        """The request in one line."""
        texts = [text if self.story is None else f"{start:g} s {text}" for start, text in self._starts]
        texts += [f"{weight:g} x {part}" for weight, part in self.mix]
        return ", ".join([*texts, *([] if self.negative is None else [f"without {self.negative}"])])

    def _report(self, scores: Sequence[float], best: int) -> None:
        """Print the similarity of every candidate to the text."""
        for number, score in enumerate(scores):
            kept = "  <- kept" if number == best else ""
            self._print(f"candidate {number + 1}  seed {self.seed + number}  similarity {score:.3f}{kept}")

    def _comment(self, best: int) -> str:
        """Return the request as JSON for the comment field of the file; `--num-samples 1` with `seed` repeats it."""
        request = {"seed": self.seed + best, "seconds": self._seconds, "model": Path(self.model).name}
        return json.dumps({**request, "text": self._title[:_MAX_COMMENT_LETTERS]}, ensure_ascii=False)

    def _print(self, message: str) -> None:
        print(printable(message), file=sys.stderr if self.out == _STANDARD_OUTPUT else sys.stdout)

    def _nan_error(self) -> RuntimeError:
        return RuntimeError(f"the model {self.model} generated NaN samples; train it longer or use another model")


def _wav_header(sample_hz: int, channels: int, num_bytes: int | None) -> bytes:
    """Header of a 16-bit WAV file; `num_bytes` is the size of the samples; None = unknown, for a stream."""
    sizes = (_UNKNOWN_SIZE, _UNKNOWN_SIZE) if num_bytes is None else (num_bytes + 36, num_bytes)
    sound = (16, 1, channels, sample_hz, sample_hz * channels * 2, channels * 2, 16)
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", sizes[0], b"WAVE", b"fmt ", *sound, b"data", sizes[1])


def _read_story(path: Path) -> list[tuple[float, str]]:
    """Read the lines of a story, each with a start in seconds and a text; empty lines and lines with # are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the story {path}: {error}") from error
    story = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        start, _, text = line.strip().partition(" ")
        try:
            story.append((float(start), text.strip()))
        except ValueError as error:
            raise ValueError(f'line {number} of {path} must be like "15 a slow waltz", got {line!r:.100}') from error
        if not text.strip():
            raise ValueError(f'line {number} of {path} has no text; write a line like "15 a slow waltz"')
    if not story:
        raise ValueError(f'{path} has no lines; write lines like "15 a slow waltz", of which the first starts at 0')
    return story


def _check(command: Generate) -> None:
    """Check the arguments and that the files can be written, before the model is loaded."""
    if command.story is not None:
        if command.text:
            raise ValueError(f"got the text {command.text!r:.60} and --story {command.story}; pass only one of them")
        _read_story(command.story)
    elif not command.text.strip():
        raise ValueError('the text is empty; describe the music, e.g. "a slow waltz on the cello"')
    if command.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {command.num_samples}")
    if command.seconds is not None and not 0 < command.seconds <= _MAX_SECONDS:
        raise ValueError(f"--seconds must be above 0 and at most {_MAX_SECONDS}, got {command.seconds:g}")
    if command.seed < 0:
        raise ValueError(f"--seed must not be negative, got {command.seed}")
    if not command.rank_seconds > 0:
        raise ValueError(f"--rank-seconds must be above 0, got {command.rank_seconds:g}")
    if command.stream and command.plot is not None:
        raise ValueError("--plot needs the whole music and cannot be used with --stream")
    if not command.stream and (command.raw or command.out == _STANDARD_OUTPUT):
        raise ValueError(f"{'--raw' if command.raw else '--out -'} needs --stream")
    if command.out != _STANDARD_OUTPUT:
        check_file(command.out, _STREAM_SUFFIXES if command.stream else _AUDIO_SUFFIXES)
    elif sys.stdout is None or sys.stdout.isatty():
        raise ValueError("standard output is a terminal or closed; pipe the samples into a player, or name a file")
    if command.plot is not None:
        from musiclm_pytorch.evaluation.plots import PICTURE_SUFFIXES, require_matplotlib

        check_file(command.plot, PICTURE_SUFFIXES)
        require_matplotlib()
