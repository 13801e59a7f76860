"""The inputs of MusicGen: texts per window, audio prompts and melodies, for one item or for several items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audio.units import check_durations
from audiolm_pytorch.audio.waves import check_rate, split_batch
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.generation.prompts import read_prompt
from audiolm_pytorch.generation.request import Prompt
from audiolm_pytorch.generation.sampling import SamplingSettings, item_seeds
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.melody import (
    Melody,
    MelodyInput,
    Stems,
    are_notes,
    is_chroma,
    melody_of,
    melody_of_stems,
)

__all__ = ["AudioInput", "MusicRequest", "TextInput"]

# One text, or a text per item; a list in place of a text has one text per window.
TextInput = str | Sequence[str | Sequence[str | None] | None]
# Waves `[n]`, `[b, n]` or `[b, c, n]`, a file, or one wave `[n]` or `[c, n]`, file or None per item.
AudioInput = Prompt | np.ndarray | Sequence[Prompt | np.ndarray | None]


@typed
@dataclass(frozen=True, kw_only=True, eq=False)
class MusicRequest:
    """Arguments of `MusicGen.generate`, which documents them."""

    texts: TextInput | None = None
    num_samples: int | None = None
    seconds: float | None = None
    prompt: AudioInput | None = None
    prompt_sample_hz: int | None = None
    melody: MelodyInput | None = None
    stems: Stems | None = None
    melody_sample_hz: int | None = None
    seeds: int | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int | None = 250
    top_p: float | None = None
    guidance_scale: float = 3.0
    stride_seconds: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges of the numbers."""
        check_durations(seconds=self.seconds)
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        for name in ("prompt_sample_hz", "melody_sample_hz"):
            if getattr(self, name) is not None:
                check_rate(getattr(self, name), name)
        if self.prompt is None and self.prompt_sample_hz is not None:
            raise ValueError("got prompt_sample_hz without prompt; pass both or neither")
        if self.melody is None and self.stems is None and self.melody_sample_hz is not None:
            raise ValueError("got melody_sample_hz without melody and stems; pass one of them, or leave out the rate")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "MusicRequest":
        """Build a request from the arguments of a call, whose other arguments are ignored."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def settings(self) -> SamplingSettings:
        """Sampling settings."""
        return SamplingSettings(self.temperature, self.top_k, self.top_p, self.guidance_scale)

    def text_schedules(self) -> list[list[str | None]]:
        """Return the texts of the windows of every item; an empty text becomes None."""
        texts = [self.texts] if isinstance(self.texts, str) else list(self.texts or [])
        schedules = [[text] if text is None or isinstance(text, str) else list(text) for text in texts]
        for item, schedule in enumerate(schedules):
            if not schedule or not all(text is None or isinstance(text, str) for text in schedule):
                raise ValueError(f"texts of item {item} must be a str, None, or a list of them, got {schedule!r:.200}")
        return [[text if text and text.strip() else None for text in schedule] for schedule in schedules]

    def prompts(self, sample_hz: int) -> list[tuple[Tensor, int]]:
        """Return wave `[c, n]` and rate of every prompt; `sample_hz` is the rate of waves without a rate."""
        hz = self.prompt_sample_hz or sample_hz
        empty = torch.zeros(1, 0), hz
        prompts = enumerate(_items(self.prompt, "prompt"))
        return [empty if item is None else read_prompt(item, hz, f"prompt {number}") for number, item in prompts]

    def melodies(self, sample_hz: int, chroma: ChromaConditioner | None) -> list[Melody | None]:
        """Return the melody of every item; `sample_hz` is the rate of waves without a rate."""
        if self.stems is not None and self.melody is not None:
            raise ValueError("got melody and stems; pass only one of them")
        read: Callable[..., Melody] = melody_of
        items, name = _items(self.melody, "melody", may_be_melody=True), "melody"
        if self.stems is not None:
            items = [self.stems] if isinstance(self.stems, Mapping) else list(self.stems)
            read, name = melody_of_stems, "stems"
        if chroma is None:
            if items:
                raise ValueError("the model has no melody condition; omit melody, or use a model with a melody")
            return []
        hz = self.melody_sample_hz or sample_hz
        return [
            None if item is None else read(item, hz, chroma, f"{name} {number}") for number, item in enumerate(items)
        ]

    def num_items(self, **inputs: int) -> int:
        """Return the number of items b. Raises ValueError if the numbers of items of `inputs` by name differ."""
        sizes = {name: size for name, size in inputs.items() if size}
        if self.num_samples is not None:
            sizes["num_samples"] = self.num_samples
        if self.seeds is not None and not isinstance(self.seeds, int):
            sizes["seeds"] = len(self.seeds)
        several = {size for size in sizes.values() if size != 1}
        if len(several) > 1 or 0 in several:
            raise ValueError(f"inputs have different numbers of items, {sizes}; pass 1 or the same number for each")
        return several.pop() if several else 1

    def item_seeds(self, batch: int) -> list[int]:
        """Return the seed of every item."""
        seeds = item_seeds(self.seeds, batch)
        return seeds * batch if len(seeds) == 1 else seeds


def _items(value: Any, name: str, may_be_melody: bool = False) -> list[Any]:
    """Split an `AudioInput` or `MelodyInput` into its items; arrays become tensors."""
    if value is None:
        return []
    if isinstance(value, (str, Path)):
        return [value]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    waves = split_batch(value, name) if isinstance(value, Tensor) else value
    if may_be_melody and (is_chroma(value) or (len(value) and are_notes(value))):
        return [value]
    return [torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in waves]
