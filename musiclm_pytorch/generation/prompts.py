"""Prompts of MusicLM: texts, weighted mixtures of texts and recordings, and stories, which change over time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.waves import one_mono_wave
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.mulan.text_tower import report_unknown_words
from musiclm_pytorch.quantizer.embed_quantizer import Modality, MuLaNEmbedQuantizer

__all__ = [
    "MAX_COMMENT_LETTERS",
    "EmbeddedPrompt",
    "Mixture",
    "MusicPrompt",
    "embed_prompts",
    "prompts_of",
    "request_comment",
    "stories_of",
    "story_of_lines",
]

MAX_COMMENT_LETTERS = 400


@typed
@dataclass(frozen=True, eq=False)
class Mixture:
    """Weighted mixture of texts and recordings, which is computed in the joint embedding of MuLaN.

    Attributes:
        parts: Pairs of a part and its weight. A part is a text, the path of an audio file (a `Path`), or a wave `[n]`
            at the sample rate of the MusicLM. Weights are not negative; only their ratios matter.
    """

    parts: Sequence[tuple[str | Path | Tensor, float]]

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.parts]
        if not all(isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(f"parts need finite weights that are not negative and not all 0, got {weights}")
        for number, (part, _) in enumerate(self.parts):
            if isinstance(part, Tensor):
                one_mono_wave(part, name=f"the wave of part {number}")

    def __repr__(self) -> str:
        """Return all parts with their weights, for titles and messages."""
        names = ["recording" if isinstance(part, Tensor) else str(part) for part, _ in self.parts]
        return " + ".join(f"{weight:g} x {name}" for name, (_, weight) in zip(names, self.parts))


# A story has pairs of a time in seconds and a prompt that is used from this time on. The first time is 0.
Story = Sequence[tuple[float, str | Mixture]]
MusicPrompt = str | Mixture | Story


@dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """A text or mixture as codes `[q]`, which condition the stages, and as a latent `[d]` of MuLaN, which ranks music.

    `seconds` is the time from which the prompt is used.
    """

    seconds: float
    codes: Tensor
    latent: Tensor


def prompts_of(text: MusicPrompt | Sequence[MusicPrompt]) -> list[MusicPrompt]:
    """Return the list of all prompts in an argument that is one prompt or several prompts."""
    if isinstance(text, (str, Mixture)) or _is_story(text):
        return [text]  # type: ignore[list-item]
    if not text:
        raise ValueError("got an empty list of texts; pass at least one text")
    return list(text)  # type: ignore[arg-type]


def stories_of(prompts: Sequence[MusicPrompt]) -> list[list[tuple[float, Mixture]]]:
    """Return every prompt as a list of times in seconds and mixtures; a text is a story with one time, 0."""
    return [_story_of(prompt) for prompt in prompts]


def story_of_lines(lines: str, source: str) -> list[tuple[float, str]]:
    """Read the lines of a story, each with a start in seconds and a text; empty lines and lines with # are skipped.

    `source` names the story in the ValueError for a wrong line.
    """
    story = []
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        start, _, text = line.strip().partition(" ")
        try:
            story.append((float(start), text.strip()))
        except ValueError as error:
            raise ValueError(
                f'line {number} of {source} must be like "15 a slow waltz" (seconds, then text), got {line!r:.99}'
            ) from error
        if not text.strip():
            raise ValueError(f'line {number} of {source} has no text; write a line like "15 a slow waltz"')
    return story


def request_comment(
    text: str,
    *,
    seed: int,
    seconds: float,
    model: str,
    options: Mapping[str, Any] | None = None,
    is_ascii: bool = False,
) -> str:
    """Return a request as JSON for the comment field of an audio file, with the first 400 letters of its text.

    `options` are the further options of `musiclm generate`, with which its command makes the file again. With
    `is_ascii`, all other letters are escaped, since libsndfile stores them wrongly in MP3 files. Letters that no file
    can store, as of a file name that is not UTF-8, are always escaped.
    """
    request: dict[str, Any] = {"seed": seed, "seconds": seconds, "model": model, "text": text[:MAX_COMMENT_LETTERS]}
    if options is not None:
        request["options"] = dict(options)
    return printable(json.dumps(request, ensure_ascii=is_ascii))


def embed_prompts(
    stories: Sequence[Sequence[tuple[float, Mixture]]], quantizer: MuLaNEmbedQuantizer, sample_hz: int
) -> list[list[EmbeddedPrompt]]:
    """Embed the prompts that `stories_of` returned. `sample_hz` is the sample rate of the waves in mixtures.

    The vectors of a mixture are those that the quantizer receives: centred, with texts mapped to audio. The result has
    the weighted mean of their lengths, so that mixtures of different texts are not closer to the mean of all music.
    It is quantized with the codes of its parts alone (`_codes_of_mixture`).
    """
    mixtures = [mixture for story in stories for _, mixture in story]
    parts = [[(part, weight) for part, weight in mixture.parts if weight > 0] for mixture in mixtures]
    texts = [part for mixture in parts for part, _ in mixture if isinstance(part, str)]
    report_unknown_words(quantizer.mulan, texts)
    text_latents = iter(quantizer.mulan.get_text_latents(texts) if texts else ())
    codes, latents = [], []
    for mixture in parts:
        weights = torch.tensor([weight for _, weight in mixture], device=device_of(quantizer), dtype=torch.float32)
        weights = weights / weights.sum()
        embedded: list[tuple[Tensor, Modality]] = [
            (next(text_latents), "text")
            if isinstance(part, str)
            else (_audio_latent(part, quantizer, sample_hz), "audio")
            for part, _ in mixture
        ]
        centred = torch.stack([quantizer.centred(latent, modality) for latent, modality in embedded])
        mean, lengths = weights @ centred, centred.norm(dim=-1)
        vector = mean * ((weights @ lengths) / mean.norm().clamp(min=1e-12))
        codes.append(_codes_of_mixture(vector, quantizer.codes_from_centred(centred), quantizer.codebooks.float()))
        latents.append(F.normalize(weights @ torch.stack([latent.float() for latent, _ in embedded]), dim=-1))
    prompts = iter(zip(codes, latents))
    return [[EmbeddedPrompt(seconds, *next(prompts)) for seconds, _ in story] for story in stories]


def _codes_of_mixture(vector: Tensor, part_codes: Tensor, codebooks: Tensor) -> Tensor:
    """Quantize the vector `[d]` of a mixture to codes `[q]`, of which each is the code of a part at its level.

    The codes that are nearest among all codes are often those of no music. Halfway between two instruments, the
    bundled model then played a third one in 54% of 56 clips, and in 29% with the codes of the parts `[parts, q]`.
    """
    residual, codes = vector, []
    for options, codebook in zip(part_codes.T, codebooks):
        codes.append(options[(residual - codebook[options]).norm(dim=-1).argmin()])
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes)


def _is_story(value: Any) -> bool:
    """Whether a value is a sequence of pairs that begin with a number."""
    return (
        not isinstance(value, (str, Mixture))
        and len(value) > 0
        and all(isinstance(item, (tuple, list)) and len(item) == 2 and not isinstance(item[0], str) for item in value)
        and all(isinstance(item[0], (int, float)) for item in value)
    )


def _story_of(prompt: MusicPrompt) -> list[tuple[float, Mixture]]:
    if isinstance(prompt, (str, Mixture)):
        prompt = [(0.0, prompt)]
    elif not _is_story(prompt):
        raise ValueError(f"a prompt is a text, a Mixture or a story [(seconds, text), ...], got {prompt!r:.200}")
    times = [float(seconds) for seconds, _ in prompt]
    if times[0] != 0 or not all(isfinite(time) for time in times) or sorted(set(times)) != times:
        raise ValueError(f"the times of a story must start with 0 and increase, got {times}")
    mixtures = [text if isinstance(text, Mixture) else Mixture([(text, 1.0)]) for _, text in prompt]
    return list(zip(times, mixtures))


def _audio_latent(part: Path | Tensor, quantizer: MuLaNEmbedQuantizer, sample_hz: int) -> Tensor:
    """Embed a recording as a latent `[d]`."""
    wave, wave_hz = (part, sample_hz) if isinstance(part, Tensor) else read_audio(part)
    wave = resample(one_mono_wave(wave, name="the recording"), wave_hz, quantizer.sample_hz)
    return quantizer.mulan.get_long_audio_latents(wave.to(device_of(quantizer)))[0]
