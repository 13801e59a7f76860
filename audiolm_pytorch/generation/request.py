"""What is asked of an AudioLM, and what it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.tokens.item_tokens import padded
from audiolm_pytorch.training.tracking import progress_bar

__all__ = ["GeneratedAudio", "GenerationRequest", "Prime", "StageBars", "takes_request"]

Prime = Tensor | str | Path


@beartype
@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """What `AudioLM.generate` and `stream` are asked for, by keyword; all kinds of input go together.

    Attributes:
        batch_size: Number of items b; where texts, waves, codes, conditions, primes, semantic tokens or seeds are
            several, their number.
        seconds: Length of every result, a prime included, rounded up to whole codec frames. None = as long as the
            semantic tokens given; else 5, or 5 more than an item's own prime, or less where the piece ends by itself.
        text: Texts that condition: through the audio conditioner the stages that take codes, through the text
            conditioner those that take states of a text encoder.
        wavs: Waves `[b, n]` that condition, at the audio conditioner's rate.
        codes: Conditioner codes `[b, q]` that condition.
        conditioning: Finished conditions by stage name, each made in the namespace of its stage; stages not named
            are unconditional, or follow text, wavs or codes.
        given: Tokens `[b, f, levels]` of the extra streams of stages, by name, with their lengths.
        prime_wave: What to continue: waves `[n]`, `[b, n]` or `[b, c, n]`, a file of any rate, or a list of files and
            waves, `[n]` or `[c, n]`. The semantic and the acoustic tokens of its whole frames are the prompts. A prime
            of less than a frame is none.
        prime_wave_input_sample_hz: Rate of primes that are no files (Hz); None = the codec's.
        prime_lengths: Samples `[b]` of each prime that are no padding.
        semantic_tokens: Semantic tokens `[b, t]` of the whole result, which is to sound: the semantic stage rests.
        semantic_lengths: Tokens `[b]` of each item that are no padding.
        coarse_only: Whether to decode the coarse levels alone.
        allow_eos: Whether a piece may end by itself. None = where neither `seconds` nor semantic tokens are given and
            the semantic stage has learned where pieces end.
        seeds: Seed of every item (an int n means n, n + 1, ...): an item depends on nothing but its own seed and
            inputs. None draws them from torch's global generator.
        sampling: Sampling of stages by name, as settings or as the fields that differ from the constructor's. The
            constructor's guidance rests where a stage has no condition to be guided by.
        callback: Called as `callback(stage, frames_known, frames_wanted)`, of the item that has most of them.
        progress: Whether to draw a bar for every stage on the terminal.

    Raises:
        ValueError: If a number is out of range or inputs exclude one another.
    """

    batch_size: int = 1
    seconds: float | int | None = None
    text: str | Sequence[str] | None = None
    wavs: Tensor | None = None
    codes: Tensor | None = None
    conditioning: Mapping[str, Conditions] | None = None
    input_streams: AudioTokens | None = None
    prime_wave: Prime | Sequence[Prime] | None = None
    prime_wave_input_sample_hz: int | None = None
    prime_lengths: Tensor | None = None
    semantic_tokens: Tensor | None = None
    semantic_lengths: Tensor | None = None
    coarse_only: bool = False
    allow_eos: bool | None = None
    seeds: int | Sequence[int] | None = None
    sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None
    callback: Callable[[str, int, int], None] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds must be positive and finite, got {self.seconds}")
        if self.prime_wave_input_sample_hz is not None and self.prime_wave_input_sample_hz < 1:
            raise ValueError(f"prime_wave_input_sample_hz must be positive, got {self.prime_wave_input_sample_hz}")
        for kind, lengths in (("prime_wave", "prime_lengths"), ("semantic_tokens", "semantic_lengths")):
            if getattr(self, kind) is None and getattr(self, lengths) is not None:
                raise ValueError(f"{lengths} says how long {kind} are, but there are none: give both or neither")
        if self.wavs is not None and not self.wavs.isfinite().all():
            raise ValueError("wavs hold NaN or infinite samples; clean them first, e.g. with torch.nan_to_num")

    def select(self, items: Sequence[int]) -> "GenerationRequest":
        """Ask for some of the items alone.

        Args:
            items: Their numbers k, any of them any number of times.

        Returns:
            A request of k items; what is given of one item still serves all.
        """
        input_streams = self.input_streams
        if input_streams is not None:
            input_streams = AudioTokens(
                _chosen_values(input_streams.tokens, items), _chosen_values(input_streams.lengths, items)
            )
        several = ("text", "wavs", "codes", "prime_lengths", "semantic_tokens", "semantic_lengths")
        primes, seeds, conditioning = self.prime_wave, self.seeds, self.conditioning
        return replace(
            self,
            **_chosen_values({name: getattr(self, name) for name in several}, items),
            batch_size=len(items),
            input_streams=input_streams,
            conditioning=None if conditioning is None else _chosen_values(conditioning, items),
            prime_wave=primes if _is_one_wave(primes) else _chosen(primes, items),
            seeds=[seeds + item for item in items] if isinstance(seeds, int) else _chosen(seeds, items),
        )

    @property
    def num_items(self) -> int:
        """Number of items that all inputs agree on; inputs of one item are given to all.

        Raises:
            ValueError: If they do not agree, or something is given of no items.
        """
        primes = self.prime_wave
        several: dict[str, Any] = {
            "text": None if isinstance(self.text, str) else self.text,
            "wavs": self.wavs,
            "codes": self.codes,
            **{f"conditioning of {stage}": one for stage, one in (self.conditioning or {}).items()},
            **{
                f"input_streams {name}": tokens
                for name, tokens in (self.input_streams.tokens if self.input_streams else {}).items()
            },
            "prime_wave": None if isinstance(primes, (str, Path)) or _is_one_wave(primes) else primes,
            "semantic_tokens": self.semantic_tokens,
            "seeds": None if isinstance(self.seeds, int) else self.seeds,
        }
        sizes = {name: len(one) for name, one in several.items() if one is not None}
        empty = [name for name, size in sizes.items() if size < 1]
        if empty:
            raise ValueError(f"{empty} hold no items: leave them out, or give one or as many as there are items")
        numbers = {size for size in (self.batch_size, *sizes.values()) if size != 1}
        if len(numbers) > 1:
            raise ValueError(
                "texts, conditions, primes, seeds and batch_size speak of different numbers of items: "
                f"{ {'batch_size': self.batch_size, **sizes} }"
            )
        return numbers.pop() if numbers else 1


def _is_one_wave(primes: object) -> bool:
    return isinstance(primes, Tensor) and primes.ndim == 1


def _chosen(value: Any, items: Sequence[int]) -> Any:
    """Some items of what is given of several; what is given of one, or not at all, as it is."""
    if value is None or isinstance(value, (str, Path)) or (isinstance(value, Tensor) and value.ndim == 0):
        return value
    if len(value) == 1:
        return value
    if isinstance(value, Conditions):
        return value.select(torch.tensor(items))
    return value[torch.tensor(items)] if isinstance(value, Tensor) else [value[item] for item in items]


def _chosen_values(values: Mapping[str, Any], items: Sequence[int]) -> dict[str, Any]:
    return {name: _chosen(value, items) for name, value in values.items()}


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_request(method: Method) -> Method:
    """Let the signature of a method that takes `**request` name what can be asked for, for `help` and completion."""
    own = signature(method)
    named = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
    asked = signature(GenerationRequest).parameters.values()
    vars(method)["__signature__"] = own.replace(parameters=[*named, *asked])
    return method


@dataclass(frozen=True, eq=False)
class GeneratedAudio:
    """What one call generated, or what became known of it with one step of a stream.

    Attributes:
        waves: A wave `[n_i]` (`[c, n_i]` for a codec of several channels) per item, float.
        sample_hz: Their rate (Hz).
        semantic: Semantic tokens `[b, t]` int64, -1 past an item's length.
        semantic_lengths: Tokens of each item `[b]` int64.
        acoustic: Acoustic tokens `[b, f, q]` int64, -1 past an item's length.
        acoustic_lengths: Frames of each item `[b]` int64.
    """

    waves: list[Tensor]
    sample_hz: int
    semantic: Tensor
    semantic_lengths: Tensor
    acoustic: Tensor
    acoustic_lengths: Tensor

    @property
    def have_one_length(self) -> bool:
        """Whether all waves are equally long."""
        return len({wave.shape[-1] for wave in self.waves}) == 1

    @property
    def wave(self) -> Tensor:
        """The waves as one tensor, `[b, n]` or `[b, c, n]`; ValueError where they are not equally long."""
        if not self.have_one_length:
            raise ValueError(
                f"the items have {[wave.shape[-1] for wave in self.waves]} samples: take them from `waves`, a list, or "
                "ask for `seconds`, which makes all equally long"
            )
        return torch.stack(self.waves)

    @classmethod
    def of_items(
        cls, waves: Sequence[Tensor], sample_hz: int, semantic: Sequence[Tensor], acoustic: Sequence[Tensor]
    ) -> "GeneratedAudio":
        """Put items together: waves `[n_i]` or `[c, n_i]`, semantic tokens `[t_i]`, acoustic tokens `[f_i, q]`."""
        lengths = [torch.tensor([len(tokens) for tokens in kind]) for kind in (semantic, acoustic)]
        return cls(list(waves), sample_hz, padded(semantic), lengths[0], padded(acoustic), lengths[1])

    @classmethod
    def joined(cls, chunks: Sequence["GeneratedAudio"]) -> "GeneratedAudio":
        """Put the chunks of a stream together to what was generated in all."""
        if not chunks:
            raise ValueError("there is nothing to join: a stream gives at least one chunk")

        def along_time(kind: str) -> list[Tensor]:
            lengths = [getattr(chunk, f"{kind}_lengths").tolist() for chunk in chunks]
            tokens = [getattr(chunk, kind) for chunk in chunks]
            parts = [[row[:count] for row, count in zip(one, counts)] for one, counts in zip(tokens, lengths)]
            return [torch.cat(item) for item in zip(*parts)]

        waves = [torch.cat(item, dim=-1) for item in zip(*(chunk.waves for chunk in chunks))]
        return cls.of_items(waves, chunks[0].sample_hz, along_time("semantic"), along_time("acoustic"))


class StageBars:
    """Bars on the terminal, one for each stage that reports."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, known: int, wanted: int) -> None:
        """Draw how far a stage is: frames known and frames wanted."""
        if stage not in self._bars:
            self._bars[stage] = progress_bar(stage, 0, wanted, shown=True)
        bar = self._bars[stage]
        bar.total = wanted
        bar.update(known - bar.n)

    def close(self) -> None:
        """Take the bars away."""
        while self._bars:
            self._bars.popitem()[1].close()
