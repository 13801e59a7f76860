"""What the page and the API ask for: checks with limits, and the arguments of the model."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audiolm_pytorch.audio.stream import AudioSource
from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.generation.prompts import story_of_lines
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musiclm import MusicLM

__all__ = ["Limits", "Model", "WebRequest", "follows_melodies"]

Model = MusicLM | MusicGen

_MAX_LETTERS = 2000
_MAX_CANDIDATES = 16  # one batch of `MusicLM`


@typed
@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, and of the queue.

    Attributes:
        seconds: Longest music, and longest upload.
        candidates: Largest number of candidates, at most 16.
        jobs: Largest number of requests that wait or run. They run one after the other.
    """

    seconds: float = 60.0
    candidates: int = 8
    jobs: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"the limit of seconds must be above 0 and at most 3600, got {self.seconds:g}")
        if not 1 <= self.candidates <= _MAX_CANDIDATES:
            raise ValueError(f"the limit of candidates must be from 1 to {_MAX_CANDIDATES}, got {self.candidates}")
        if self.jobs < 1:
            raise ValueError(f"the limit of jobs must be at least 1, got {self.jobs}")


def follows_melodies(model: Model) -> bool:
    """Whether a model accepts melodies."""
    return (model.melody_embedder if isinstance(model, MusicLM) else model.chroma) is not None


@typed
@dataclass(frozen=True, kw_only=True)
class WebRequest:
    """A request for music.

    Attributes:
        text: Description of the music, the first part of a story; empty if the story starts at 0.
        model: Name of a model of the server; None = its first.
        seconds: Length of the music, a continued recording included.
        candidates: Number of candidates.
        seed: First seed; None = a random seed.
        guidance: Strength of the text; None = the default of the model.
        negative: Text from which the music is led away, for a MusicLM.
        story: Further parts of the music, for a MusicLM: lines of a start in seconds and a text.
        continue_from: Path of a recording that is continued.
        melody: Path of a recording whose melody the music follows.
        live: Whether the music is played while it is generated.
    """

    text: str = ""
    model: str | None = None
    seconds: float = 5.0
    candidates: int = 4
    seed: int | None = None
    guidance: float | None = None
    negative: str = ""
    story: str = ""
    continue_from: str | None = None
    melody: str | None = None
    live: bool = False

    @property
    def parts(self) -> list[tuple[float, str]]:
        """The texts, each with its start in seconds."""
        first = [(0.0, self.text.strip())] if self.text.strip() else []
        return first + story_of_lines(self.story, "the story")

    @property
    def title(self) -> str:
        """The request in one line."""
        texts = [f"{start:g} s {text}" if start else text for start, text in self.parts]
        return ", ".join(texts + ([f"without {self.negative.strip()}"] if self.negative.strip() else []))

    def name_of_model(self, models: Mapping[str, Model]) -> str:
        """Return the name of the requested model."""
        name = next(iter(models)) if self.model is None else self.model
        if name not in models:
            raise ValueError(f"there is no model {name!r:.60}; choose one of: {', '.join(models)}")
        return name

    def check(self, models: Mapping[str, Model], limits: Limits) -> None:
        """Raise a ValueError of one line for a request that cannot be fulfilled."""
        model = models[self.name_of_model(models)]
        for name in ("text", "negative", "story"):
            value = getattr(self, name)
            if len(value) > _MAX_LETTERS:
                raise ValueError(f"{name} has {len(value)} letters, at most {_MAX_LETTERS} are possible; shorten it")
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError(f"{name} is not valid Unicode; type it again")
        if not self.parts:
            raise ValueError('the text is empty; describe the music, e.g. "a slow waltz on the cello"')
        starts = [start for start, _ in self.parts]
        if starts[0] != 0:
            raise ValueError(
                f"the first line of the story starts at {starts[0]:g} s, but the text is empty; "
                "fill in the text, which starts at 0, or let the first line start at 0"
            )
        if 0 in starts[1:]:
            raise ValueError(
                "a line of the story starts at 0 s, but another part already starts there; "
                "leave the text empty, or remove the line"
            )
        if not 0 < self.seconds <= limits.seconds:
            raise ValueError(f"seconds must be above 0 and at most {limits.seconds:g}, got {self.seconds:g}")
        if not 1 <= self.candidates <= limits.candidates:
            raise ValueError(f"candidates must be from 1 to {limits.candidates}, got {self.candidates}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, or empty for a random seed; got {self.seed}")
        if self.guidance is not None and not 1 <= self.guidance <= 100:
            raise ValueError(f"guidance must be from 1 to 100, or empty for that of the model; got {self.guidance:g}")
        if self.melody is not None and not follows_melodies(model):
            fitting = [name for name, other in models.items() if follows_melodies(other)]
            advice = f"choose {' or '.join(fitting)}" if fitting else "leave the melody out"
            raise ValueError(f"this model does not follow melodies; {advice}")
        for name in ("continue_from", "melody"):
            if (path := getattr(self, name)) is not None:
                _check_upload(name, Path(path), limits.seconds)
        if isinstance(model, MusicGen):
            for name in ("negative", "story"):
                if getattr(self, name).strip():
                    raise ValueError(f"{name} needs a MusicLM, this model is a MusicGen; leave {name} empty")

    def arguments(self, model: Model, seed: int, callback: Callable[..., None]) -> dict[str, Any]:
        """Return the arguments of `generate` and `stream` of a MusicGen, or of the call and `stream` of a MusicLM."""
        shared = {"seconds": self.seconds, "num_samples": self.candidates, "melody": self.melody, "callback": callback}
        if isinstance(model, MusicGen):
            guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
            return {**shared, **guidance, "texts": self.text, "seeds": seed, "prompt": self.continue_from}
        stages = ("semantic", "coarse")
        guided = None if self.guidance is None else dict.fromkeys(stages, {"guidance_scale": self.guidance})
        return {
            **shared,
            "text": self.parts,
            "negative_text": self.negative.strip() or None,
            "seed": seed,
            "prime_wave": self.continue_from,
            "sampling": guided,
        }

    @property
    def first_seed(self) -> int:
        """The seed of the first candidate; a random seed is another one at every call."""
        return secrets.randbelow(10**6) if self.seed is None else self.seed


def _check_upload(name: str, path: Path, max_seconds: float) -> None:
    """Check that an uploaded file is sound of at most this duration; messages name the file without its folder."""
    try:
        info = AudioSource(path).info
    except ValueError as error:
        raise ValueError(
            f"{name}: {str(error).replace(str(path), path.name)}; upload a wav, flac, ogg or mp3"
        ) from error
    seconds = info.num_samples / info.sample_hz
    if seconds > max_seconds:
        raise ValueError(f"{name}: {path.name} has {seconds:.1f} s, at most {max_seconds:g} s are possible; cut it")
