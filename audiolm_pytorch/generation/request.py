"""The arguments and the results of generation, and the decoding of acoustic tokens to waves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import check_durations
from audiolm_pytorch.audio.waves import check_rate, mono_waves
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.tokens.token_batch import TokenBatch
from audiolm_pytorch.training.tracking import ProgressLog, progress_bar

__all__ = [
    "ConditionChange",
    "GeneratedAudio",
    "GenerationRequest",
    "ProgressBars",
    "Prompt",
    "WaveStreams",
    "decode_items",
]

Prompt = Tensor | str | Path


@typed
@dataclass(frozen=True, eq=False)
class ConditionChange:
    """Conditions that replace those of a request from some time on.

    Attributes:
        seconds: Time of the change of every item, `[b]` float64, counted from the start of the result; infinity = the
            item does not change.
        conditioning: Conditions of the items by stage name, then by name of the condition.
    """

    seconds: Tensor
    conditioning: Mapping[str, Conditions]


@typed
@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """Arguments of `AudioLM.forward`: inputs (which can be combined), lengths and settings of a generation.

    Attributes:
        batch_size: Number of items b; all other inputs have 1 or b items. If `batch_size` is 1, the other inputs
            determine b.
        seconds: Duration of every result, prompt included, rounded up to whole codec frames; None = the duration of
            `semantic_tokens` or, without them, of the prompt plus 5 s. A sampled end token makes a result shorter.
        text: Texts to condition on; the audio conditioner computes their codes and the text conditioner their states.
        wavs: Waves `[b, n]` to condition on, at the sample rate of the audio conditioner.
        codes: Codes `[b, q]` to condition on, computed by the audio conditioner.
        conditions: Embeddings `[b, d]`, or `[b, m, d]` for m embeddings per item, of further conditions by name. A
            stage uses those of the `conditions` that its transformer accepts.
        conditioning: Precomputed conditions by stage name, then by name of the condition; codes must be embedded with
            the table of the stage. A stage without an entry in `conditioning` uses `text`, `wavs` and `codes`.
        condition_changes: Later conditions, in the order of time.
        negative_conditioning: Conditions from which guidance leads away, by stage name and name of the condition.
        input_streams: Tokens `[b, f, levels]` and lengths of the extra input streams of the stages, by stream name.
        prime_wave: Prompts to continue: a tensor of waves `[n]`, `[b, n]` or `[b, c, n]`, the path of an audio file, or
            a list of paths and waves `[n]` or `[c, n]`. Only complete frames of a prompt are used.
        prime_wave_input_sample_hz: Sample rate in Hz of the waves in `prime_wave`; None = the rate of the codec.
        prime_lengths: Number of samples `[b]` of each wave in `prime_wave`, without padding.
        semantic_tokens: Semantic tokens `[b, t]` of the whole result, instead of tokens of the semantic stage.
        semantic_lengths: Number of tokens `[b]` of each item in `semantic_tokens`, without padding.
        coarse_only: Whether to skip the fine stage and decode the wave from the coarse levels alone.
        allow_eos: Whether the model may end an item early; None = yes if the model was trained with end tokens, and
            neither `seconds` nor `semantic_tokens` is set.
        seeds: Seed of every item; an int n = the seeds n, n + 1, ...; None draws seeds from torch's global generator. A
            result depends only on the seed and the inputs of its item.
        sampling: Sampling settings by stage name, or a dict of the fields that differ from the settings of the model.
            Stages without a condition ignore a guidance scale in the settings of the model.
        callback: Called as `callback(stage, known_frames, requested_frames)`, with the numbers of frames of the longest
            item. An error that it raises ends the generation.
    """

    batch_size: int = 1
    seconds: float | None = None
    text: str | Sequence[str] | None = None
    wavs: Tensor | None = None
    codes: Tensor | None = None
    conditions: Mapping[str, Tensor | ConditionTensor] | None = None
    conditioning: Mapping[str, Conditions] | None = None
    condition_changes: Sequence[ConditionChange] = ()
    negative_conditioning: Mapping[str, Conditions] | None = None
    input_streams: AudioTokens | None = None
    prime_wave: Prompt | Sequence[Prompt] | None = None
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
        """Check ranges, and that nothing is passed without its wave or tensor."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        check_durations(seconds=self.seconds)
        if self.prime_wave_input_sample_hz is not None:
            check_rate(self.prime_wave_input_sample_hz, "prime_wave_input_sample_hz")
        for name, detail in (
            ("prime_wave", "prime_wave_input_sample_hz"),
            ("prime_wave", "prime_lengths"),
            ("semantic_tokens", "semantic_lengths"),
        ):
            if getattr(self, name) is None and getattr(self, detail) is not None:
                raise ValueError(f"got {detail} without {name}; pass both or neither")
        if self.wavs is not None:
            object.__setattr__(self, "wavs", mono_waves(self.wavs, name="wavs"))
        if isinstance(self.prime_wave, Tensor) and self.prime_wave.ndim not in (1, 2, 3):
            raise ValueError(f"prime_wave must be [n], [b, n] or [b, c, n], got shape {list(self.prime_wave.shape)}")

    def select(self, items: Sequence[int]) -> "GenerationRequest":
        """Return a request for the items with the indices `items`, in this order. An index may occur several times.

        An input with a single item is not changed, because it applies to all items.
        """
        num_items = self.num_items
        if any(not 0 <= item < num_items for item in items):
            raise ValueError(f"items must be in 0..{num_items - 1}, got {list(items)}")
        names = ["text", "wavs", "codes", "conditions", "conditioning", "negative_conditioning", "input_streams"]
        names += ["prime_wave", "prime_lengths", "semantic_tokens", "semantic_lengths", "seeds"]
        if _is_one_wave(self.prime_wave):
            names.remove("prime_wave")
        selected = {name: _select(getattr(self, name), items) for name in names}
        selected["condition_changes"] = tuple(
            ConditionChange(_select(change.seconds, items), _select(change.conditioning, items))
            for change in self.condition_changes
        )
        return replace(self, batch_size=len(items), **selected)

    @property
    def num_items(self) -> int:
        """Number of items b. Raises ValueError if inputs have different numbers of items or are empty."""
        prompts = self.prime_wave
        extra = {} if self.input_streams is None else self.input_streams.tokens
        inputs: dict[str, Any] = {
            "text": None if isinstance(self.text, str) else self.text,
            "wavs": self.wavs,
            "codes": self.codes,
            **{f"conditions {name}": condition for name, condition in (self.conditions or {}).items()},
            **_named("conditioning", self.conditioning),
            **_named("negative_conditioning", self.negative_conditioning),
            **{f"change {number}": change.seconds for number, change in enumerate(self.condition_changes)},
            **{f"input_streams {name}": tokens for name, tokens in extra.items()},
            "prime_wave": None if isinstance(prompts, (str, Path)) or _is_one_wave(prompts) else prompts,
            "semantic_tokens": self.semantic_tokens,
            "seeds": None if isinstance(self.seeds, int) else self.seeds,
        }
        sizes = {name: len(value) for name, value in inputs.items() if value is not None}
        empty = [name for name, size in sizes.items() if size < 1]
        if empty:
            raise ValueError(f"{empty} have no items; omit them, or pass 1 item for all, or 1 item for each")
        several = {size for size in (self.batch_size, *sizes.values()) if size != 1}
        if len(several) > 1:
            sizes = {"batch_size": self.batch_size, **sizes}
            raise ValueError(f"inputs have different numbers of items, {sizes}; pass 1 or the same number for each")
        return several.pop() if several else 1


def _named(name: str, conditioning: Mapping[str, Conditions] | None) -> dict[str, ConditionTensor]:
    """Return all conditions by a description for error messages."""
    return {
        f"{name} of {stage} ({condition})": tensor
        for stage, conditions in (conditioning or {}).items()
        for condition, tensor in conditions.items()
    }


def _is_one_wave(prompts: object) -> bool:
    return isinstance(prompts, Tensor) and prompts.ndim == 1


def _select(value: Any, items: Sequence[int]) -> Any:
    """Select items of the batch in an input or in all values of a mapping; an input of one item stays unchanged."""
    if isinstance(value, Mapping):
        return {name: _select(entry, items) for name, entry in value.items()}
    if isinstance(value, AudioTokens):
        return AudioTokens(_select(value.tokens, items), _select(value.lengths, items))
    if isinstance(value, int):  # the first of consecutive seeds
        return [value + item for item in items]
    if value is None or isinstance(value, (str, Path)) or (isinstance(value, Tensor) and value.ndim == 0):
        return value
    if len(value) == 1:
        return value
    if isinstance(value, ConditionTensor):
        return value.select(torch.tensor(items))
    return value[torch.tensor(items)] if isinstance(value, Tensor) else [value[item] for item in items]


@dataclass(frozen=True, eq=False)
class GeneratedAudio:
    """Generated waves and tokens: the result of `AudioLM.generate`, or one chunk of `AudioLM.stream`.

    Attributes:
        waves: One float wave `[n_i]` per item, or `[c, n_i]` if the codec has several channels.
        sample_hz: Sample rate of the waves in Hz.
        semantic: Semantic tokens `[b, t]` int64, -1 past the length of an item.
        semantic_lengths: Number of semantic tokens of each item, `[b]` int64.
        acoustic: Acoustic tokens `[b, f, q]` int64, -1 past the length of an item.
        acoustic_lengths: Number of acoustic frames of each item, `[b]` int64.
    """

    waves: list[Tensor]
    sample_hz: int
    semantic: Tensor
    semantic_lengths: Tensor
    acoustic: Tensor
    acoustic_lengths: Tensor

    @property
    def have_one_length(self) -> bool:
        """Whether all waves have the same length."""
        return len({wave.shape[-1] for wave in self.waves}) == 1

    @property
    def wave(self) -> Tensor:
        """All waves as one tensor `[b, n]` or `[b, c, n]`; raises a ValueError if the waves differ in length."""
        if not self.have_one_length:
            raise ValueError(
                f"the items have {[wave.shape[-1] for wave in self.waves]} samples; use the list `waves`, or request "
                "`seconds`, so that all items have the same length"
            )
        return torch.stack(self.waves)

    @classmethod
    def of_tokens(
        cls, waves: list[Tensor], sample_hz: int, semantic: TokenBatch, acoustic: TokenBatch
    ) -> "GeneratedAudio":
        """Build the result from waves, semantic tokens of one level, and acoustic tokens."""
        return cls(waves, sample_hz, semantic.ids[..., 0], semantic.lengths, acoustic.ids, acoustic.lengths)

    @classmethod
    def concatenate(cls, chunks: Sequence["GeneratedAudio"]) -> "GeneratedAudio":
        """Concatenate the chunks of a stream in time."""
        if not chunks:
            raise ValueError("got no chunks to concatenate; pass at least one")

        def joined(kind: str) -> TokenBatch:
            parts = [TokenBatch(getattr(chunk, kind), getattr(chunk, f"{kind}_lengths")).items() for chunk in chunks]
            return TokenBatch.of_items([torch.cat(item) for item in zip(*parts)])

        waves = [torch.cat(item, dim=-1) for item in zip(*(chunk.waves for chunk in chunks))]
        semantic, acoustic = joined("semantic"), joined("acoustic")
        return cls(waves, chunks[0].sample_hz, semantic.ids, semantic.lengths, acoustic.ids, acoustic.lengths)


def decode_items(codec: Codec, acoustic: TokenBatch, num_samples: Sequence[int]) -> list[Tensor]:
    """Decode tokens to waves `[n_i]`, or `[c, n_i]` for a codec of several channels.

    Items of equal length are decoded in one batch, so that padding does not change the result.
    """
    waves: list[Tensor] = [torch.zeros(0)] * len(acoustic)
    sizes = list(zip(acoustic.lengths.tolist(), num_samples))
    for size in dict.fromkeys(sizes):
        items = [item for item, item_size in enumerate(sizes) if item_size == size]
        codes = acoustic.ids[items, : size[0]].to(device_of(codec))
        decoded = codec.decode_from_codebook_indices(codes, num_samples=size[1])
        for item, wave in zip(items, decoded):
            waves[item] = wave[0] if len(wave) == 1 else wave
    return waves


class WaveStreams:
    """Decoder streams of a codec, one per item, because items end at different times."""

    def __init__(self, codec: Codec, num_samples: Sequence[int]) -> None:
        self._codec, self._remaining_samples = codec, list(num_samples)
        self._streams: list[DecoderStream | None] = [codec.decoder_stream() for _ in num_samples]

    def push(self, acoustic: TokenBatch, are_last: Sequence[bool]) -> list[Tensor]:
        """Decode the next tokens of every item to waves `[n_i]`, or `[c, n_i]` for a codec of several channels.

        Samples that also depend on later tokens are returned by later calls. `are_last[i]`: item i has no later tokens.
        """
        return [self._push(item, *pair) for item, pair in enumerate(zip(acoustic.items(), are_last, strict=True))]

    def _push(self, item: int, tokens: Tensor, is_last: bool) -> Tensor:
        stream, parts = self._streams[item], [torch.zeros(1, self._codec.channels, 0, device=device_of(self._codec))]
        if stream is not None and len(tokens):
            parts.append(stream.push(tokens.unsqueeze(0).to(parts[0].device)))
        if stream is not None and is_last:
            parts.append(stream.finish())
            self._streams[item] = None
        wave = torch.cat(parts, dim=-1)[0, :, : self._remaining_samples[item]]
        self._remaining_samples[item] -= wave.shape[-1]
        return wave[0] if len(wave) == 1 else wave


class ProgressBars:
    """Progress bars on the terminal, one per stage; without a terminal, a line in the log every few minutes."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}
        self._logs: dict[str, ProgressLog] = {}

    def __call__(self, stage: str, known_frames: int, requested_frames: int) -> None:
        """Update the progress bar and the log of `stage`."""
        if stage not in self._bars:
            self._bars[stage] = progress_bar(stage, 0, requested_frames, shown=True)
            self._logs[stage] = ProgressLog(stage, known_frames, requested_frames, shown=True, unit="frame")
        bar = self._bars[stage]
        bar.total = requested_frames
        bar.update(known_frames - bar.n)
        self._logs[stage].update(known_frames)

    def close(self) -> None:
        """Remove all progress bars from the terminal."""
        while self._bars:
            self._bars.popitem()[1].close()
