"""`musiclm generate`: music from a text."""

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import ModelOptions, device_named, option_name
from musiclm_pytorch.cli.generate_checks import (
    LAST_SECONDS,
    STANDARD_OUTPUT,
    check_request,
    read_prompts,
    read_story,
)

if TYPE_CHECKING:
    from torch import Tensor

    from musiclm_pytorch.generation.watermark import AudioSealWatermark
    from musiclm_pytorch.musicgen.musicgen import GeneratedMusic, MusicGen
    from musiclm_pytorch.musiclm import MusicChunk, MusicLM

    _Chunk = MusicChunk | GeneratedMusic

__all__ = ["REPEATED_OPTIONS", "Generate"]

# The options in the comment of a file, with which `musiclm generate` makes it again.
REPEATED_OPTIONS = (
    *("seed", "num_samples", "seconds", "model", "story", "mix", "negative", "guidance_scale", "temperature"),
    *("continue_from", "continue_seconds", "melody", "watermark"),
)

_UNKNOWN_SIZE = 0xFFFFFFFF
_NUM_SAMPLES, _RANK_SECONDS = 4, 3.0


@dataclass(frozen=True)
class Generate(ModelOptions):
    """Generate music from a text. MuLaN ranks the candidates, and the best candidate is written."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ""
    """Description of the music, e.g. "a fast jig played on the flute"."""
    story: Path | None = None
    """Instead of TEXT: file with a line for each part of the music, its start in seconds and its text, e.g.
    "15 a slow waltz". The first start is 0."""
    prompts: Path | None = None
    """Instead of TEXT: file with one text a line. Their music is written into numbered files: music-1.wav, ..."""
    mix: tuple[tuple[float, str], ...] = ()
    """Further texts or audio files to mix with TEXT, each after its weight; TEXT has the weight 1. An example is
    --mix 0.5 "a slow cello" 0.2 drums.wav."""
    negative: str | None = None
    """Text from which the music is led away, e.g. "drums". Needs a guidance scale above 1."""
    guidance_scale: float | None = None
    """Strength of the text in the semantic and the coarse stage; 1 is no guidance. By default that of the model."""
    temperature: float | None = None
    """Temperature of the semantic and the coarse stage: below 1 more regular music, 0 always the most likely token. By
    default that of the model."""
    model: str = "tiny"
    """Name of a bundled model, the folder of a trained one, or a hub id. MusicGen and AudioGen models, for example
    facebook/musicgen-small, generate one piece without ranking."""
    seconds: float | None = None
    """Length in seconds, rounded up to whole frames. By default 5, with --story 5 after the last start, and with
    --continue-from 5 after the recording."""
    num_samples: int | None = None
    """Number of candidates of a MusicLM; default: 4, or 1 with --stream and without --rank-seconds."""
    keep_all: bool = False
    """Also write the other candidates, into files with their seeds: music-seed5.wav."""
    seed: int = 0
    """Candidate i is sampled with seed + i. The same command generates the same music."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... or auto, which selects a GPU if there is one."""
    continue_from: Path | None = None
    """Audio file to continue, of any sample rate. Its length counts towards --seconds."""
    continue_seconds: float | None = None
    """With --continue-from: continue only this many last seconds of the recording, with which the music begins."""
    melody: Path | None = None
    """Audio file whose melody the music follows, e.g. hummed or whistled, for models with a melody."""
    out: Path = Path("music.wav")
    """File to write (.wav, .flac, .ogg or .mp3; with --stream .wav or .raw, or - for standard output). A missing folder
    is created. Without --stream, the comment field of the file has the options that make it again (musiclm info)."""
    stream: bool = False
    """Write 16-bit samples while the music is generated. If there are several candidates, MuLaN ranks about the first
    --rank-seconds of each, and only the best one is continued; samples outside -1..1 are clipped."""
    rank_seconds: float | None = None
    """With --stream and several candidates: length of the first part that is ranked; default: 3."""
    raw: bool = False
    """With --stream: write no WAV header, only little-endian samples. A file that ends in .raw never has a header."""
    watermark: str | None = None
    """Mark the music inaudibly with the AudioSeal weights in this folder or hub id, for example facebook/audioseal
    (needs the [watermark] extra)."""
    plot: Path | None = None
    """Plot the wave and its mel spectrogram into this picture file (needs the [plot] extra)."""
    json: bool = False
    """Print one line of JSON for each piece of music: file, seconds, sample rate, and seed and similarity of all
    candidates."""

    def execute(self) -> int:
        """Write the best candidate to a file and print the similarity of each candidate to the text."""
        check_request(self)

        from musiclm_pytorch.musicgen.published import is_musicgen

        source, device = self.source_of(self.model), device_named(self.device)
        _ = self._watermark  # a mistake ends the command before the model is loaded
        if is_musicgen(**source):
            from musiclm_pytorch.musicgen.musicgen import MusicGen

            musicgen = MusicGen.from_pretrained(**source, device=device)
            for piece in self._pieces():
                piece._generate_musicgen(musicgen)
            return 0
        from musiclm_pytorch.musiclm import MusicLM

        musiclm = MusicLM.from_pretrained(**source, device=device)
        for piece in self._pieces():
            if self.stream:
                piece._stream(musiclm)
            else:
                piece._generate(musiclm)
        return 0

    def _pieces(self) -> "Iterator[Generate]":
        """Yield the command of each text in --prompts, or this command."""
        if self.prompts is None:
            yield self
            return
        for number, text in enumerate(read_prompts(self.prompts), start=1):
            piece = replace(self, text=text, prompts=None, out=_with_ending(self.out, number))
            if self.plot is not None:
                piece = replace(piece, plot=_with_ending(self.plot, number))
            piece.__dict__["_watermark"] = self._watermark  # loaded once
            yield piece

    def _generate_musicgen(self, musicgen: "MusicGen") -> None:
        """Write the music of a MusicGen to a file, or chunk by chunk."""
        names = ("story", "mix", "negative", "num_samples", "keep_all", "rank_seconds")
        options = [option_name(name) for name in names if getattr(self, name) not in (None, (), False)]
        if options:
            raise ValueError(
                f"{' and '.join(options)} need a MusicLM, {self.model} is a MusicGen; leave out {' and '.join(options)}"
            )
        request: dict[str, Any] = {
            "texts": self.text,
            "seconds": self._seconds,
            "seeds": self.seed,
            **dict(zip(("prompt", "prompt_sample_hz"), self._prompt)),
            "melody": self.melody,
            **self._sampling,
        }
        if self.stream:
            self._write_chunks(musicgen.stream(**request))
        else:
            self._write_music(musicgen.generate(**request, progress=True).waves[0], musicgen.sample_hz, 0)

    def _generate(self, musiclm: "MusicLM") -> None:
        """Write the best candidate of a MusicLM to a file, and the others too with --keep-all."""
        from audiolm_pytorch.audio.files import write_audio

        candidates = musiclm(**self._request(), return_all=True, progress=True)
        best, sample_hz = int(candidates.order[0, 0]), candidates.sample_hz
        scores = candidates.scores[0].tolist()
        waves = candidates.waves[0]
        others = [number for number in range(len(waves)) if number != best] if self.keep_all else []
        for number in others:
            path = _with_ending(self.out, f"seed{self.seed + number}")
            write_audio(path, self._marked(waves[number], sample_hz), sample_hz, comment=self._comment(number))
            self._print(f"wrote {path}")
        self._write_music(waves[best], sample_hz, best, scores)

    def _write_music(self, wave: "Tensor", sample_hz: int, best: int, scores: Sequence[float] = ()) -> None:
        """Write a wave and its plot; `best` is the number of the selected candidate of those with `scores`."""
        from audiolm_pytorch.audio.files import peak_safe, write_audio

        wave = peak_safe(self._marked(wave, sample_hz))
        write_audio(self.out, wave, sample_hz, comment=self._comment(best, 1 if scores else None))
        self._report(scores, best)
        self._print(f"wrote {self.out}")
        if self.plot is not None:
            from musiclm_pytorch.evaluation.plots import plot_wave

            plot_wave(wave, sample_hz, self.plot, title=self._title)
            self._print(f"wrote {self.plot}")
        self._print_json(scores, best, wave.shape[-1] / sample_hz, sample_hz)

    def _print_json(self, scores: Sequence[float], best: int, seconds: float, sample_hz: int) -> None:
        """Print the result for scripts."""
        if self.json:
            numbers: Sequence[float | None] = scores or [None]
            candidates = [{"seed": self.seed + number, "similarity": score} for number, score in enumerate(numbers)]
            print(
                json.dumps(
                    {
                        "file": str(self.out),
                        "text": self._title,
                        "seed": self.seed + best,
                        "seconds": seconds,
                        "sample_hz": sample_hz,
                        "model": self.model,
                        "candidates": candidates,
                    }
                )
            )

    @property
    def _prompt(self) -> "tuple[Path | Tensor | None, int | None]":
        """The recording to continue, as a file or as the wave `[1, c, n]` of its end with the sample rate."""
        if self.continue_from is None or self.continue_seconds is None:
            return self.continue_from, None
        from audiolm_pytorch.audio.files import read_audio

        wave, sample_hz = read_audio(self.continue_from, channels=None)
        return wave[None, :, -max(1, round(self.continue_seconds * sample_hz)) :], sample_hz

    @property
    def prompt_seconds(self) -> float:
        """The length of the part of the recording that is continued."""
        if self.continue_from is None:
            return 0.0
        from audiolm_pytorch.audio.stream import AudioSource

        recording = AudioSource(self.continue_from).info
        return min(recording.num_samples / recording.sample_hz, self.continue_seconds or inf)

    @property
    def _sampling(self) -> dict[str, float]:
        """The sampling settings that differ from those of the model."""
        settings = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        return {name: value for name, value in settings.items() if value is not None}

    def _request(self) -> dict[str, Any]:
        """Return the arguments of `MusicLM.forward` and `MusicLM.stream`."""
        from musiclm_pytorch.generation.prompts import Mixture

        parts = [(Path(part) if Path(part).is_file() else part, weight) for weight, part in self.mix]
        story = [(start, Mixture([(text, 1.0), *parts]) if parts else text) for start, text in self._starts]
        return {
            "text": story,
            "melody": self.melody,
            "negative_text": self.negative,
            "num_samples": self.num_samples or (1 if self.stream and self.rank_seconds is None else _NUM_SAMPLES),
            "seconds": self._seconds,
            "seed": self.seed,
            **dict(zip(("prime_wave", "prime_wave_input_sample_hz"), self._prompt)),
            "sampling": dict.fromkeys(("semantic", "coarse"), self._sampling) if self._sampling else None,
        }

    def _stream(self, musiclm: "MusicLM") -> None:
        """Write the music chunk by chunk, and print the scores of the candidates after the first chunk."""
        chunks = musiclm.stream(**self._request(), rank_seconds=self.rank_seconds or _RANK_SECONDS)
        first = next(chunks)
        if first.scores is not None:
            self._report(first.scores[0].tolist(), first.seeds[0] - self.seed)
        self._write_chunks(chain([first], chunks))

    def _write_chunks(self, chunks: "Iterator[_Chunk]") -> None:
        """Write the first wave of every chunk as soon as the chunk is generated; an older file stays until the end."""
        from audiolm_pytorch.audio.stream import partial_path

        first = next(chunks)  # before the file is created
        if not self.out.is_file():
            self._write_samples(first, chunks, self.out)
        else:
            out = self.out.resolve()
            partial = partial_path(out)
            try:
                self._write_samples(first, chunks, partial)
                partial.replace(out)
            finally:
                partial.unlink(missing_ok=True)
        self._print(f"wrote {'standard output' if self.out == STANDARD_OUTPUT else self.out}")

    def _write_samples(self, first: "_Chunk", chunks: "Iterator[_Chunk]", path: Path) -> None:
        """Write a header and the samples of all chunks."""
        from audiolm_pytorch.training.tracking import ProgressLog, progress_bar

        channels = len(first.waves[0]) if first.waves[0].ndim == 2 else 1
        has_header = not self.raw and self.out.suffix.lower() != ".raw"
        to_file = path != STANDARD_OUTPUT
        if to_file:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._disk_errors(), open(path if to_file else sys.stdout.fileno(), "wb", closefd=to_file) as file:
            if has_header:
                file.write(_wav_header(first.sample_hz, channels, None))
            num_bytes = num_samples = 0
            log = ProgressLog("music", 0, round(self._seconds), to_file, unit="second")
            with progress_bar("samples", 0, round(self._seconds * first.sample_hz), shown=to_file) as bar:
                for chunk in chain([first], chunks):
                    wave = self._marked(chunk.waves[0], first.sample_hz)
                    samples = (wave.clamp(-1, 1) * 32767).round().cpu().numpy()
                    num_bytes += file.write(samples.T.astype("<i2").tobytes())
                    file.flush()
                    bar.update(wave.shape[-1])
                    num_samples += wave.shape[-1]
                    log.update(num_samples // first.sample_hz)
            if has_header and to_file and file.seekable():
                file.seek(0)
                file.write(_wav_header(first.sample_hz, channels, num_bytes))

    @cached_property
    def _watermark(self) -> "AudioSealWatermark | None":
        if self.watermark is None:
            return None
        from musiclm_pytorch.generation.watermark import AudioSealWatermark

        return AudioSealWatermark.from_pretrained(**self.source_of(self.watermark), device=device_named(self.device))

    def _marked(self, wave: "Tensor", sample_hz: int) -> "Tensor":
        """Check that a wave is finite, and add the watermark."""
        if not wave.isfinite().all():
            raise RuntimeError(f"the model {self.model} generated NaN samples; train it longer or use another model")
        return wave if self._watermark is None else self._watermark(wave, sample_hz)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Name the file in errors such as "No space left on device"."""
        try:
            yield
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, f"cannot write to {self.out}: {error.strerror}") from error

    @property
    def _starts(self) -> list[tuple[float, str]]:
        """The texts, each with its start in seconds."""
        return [(0.0, self.text)] if self.story is None else read_story(self.story)

    @cached_property
    def _seconds(self) -> float:
        if self.seconds is not None:
            return self.seconds
        return max(self._starts[-1][0], self.prompt_seconds) + LAST_SECONDS

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

    def _comment(self, best: int, num_samples: int | None = 1) -> str:
        """Return the request as JSON for the comment field of the file; `num_samples` repeats it (None: MusicGen)."""
        from musiclm_pytorch.generation.prompts import request_comment

        values = {name: getattr(self, name) for name in REPEATED_OPTIONS if name not in ("seed", "seconds", "model")}
        values["mix"] = [(weight, _without_folders(part)) for weight, part in self.mix]
        values["num_samples"] = num_samples
        for name in ("story", "continue_from", "melody", "watermark"):
            values[name] = values[name] and _without_folders(values[name])
        return request_comment(
            self.text if self.story is None else self._title,
            seed=self.seed + best,
            seconds=self._seconds,
            model=_without_folders(self.model),
            options={name: value for name, value in values.items() if value not in (None, [])},
            is_ascii=self.out.suffix.lower() == ".mp3",
        )

    def _print(self, message: str) -> None:
        if not self.json:
            print(printable(message), file=sys.stderr if self.out == STANDARD_OUTPUT else sys.stdout)


def _wav_header(sample_hz: int, channels: int, num_bytes: int | None) -> bytes:
    """Header of a 16-bit WAV file; `num_bytes` is the size of the samples; None = unknown, for a stream."""
    sizes = (_UNKNOWN_SIZE, _UNKNOWN_SIZE) if num_bytes is None else (num_bytes + 36, num_bytes)
    sound = (16, 1, channels, sample_hz, sample_hz * channels * 2, channels * 2, 16)
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", sizes[0], b"WAVE", b"fmt ", *sound, b"data", sizes[1])


def _without_folders(path: Path | str) -> str:
    """Return a text, or a path; of an absolute path only the name, since the folders name the user of a computer."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _with_ending(path: Path, ending: object) -> Path:
    """Return a path whose name ends in `-ending`, before the suffix."""
    return path.with_name(f"{path.stem}-{ending}{path.suffix}")
