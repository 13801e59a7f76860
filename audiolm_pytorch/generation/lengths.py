"""Lengths and prompts of a generation request, in frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import frames_covering, samples_covering
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.generation.prompts import tokenize_prompts
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.item_tokens import items_of_streams

__all__ = ["GenerationLengths", "extra_input_tokens", "plan_lengths"]

DEFAULT_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class GenerationLengths:
    """Requested lengths and prompt tokens of all items. A sampled end token can make an item shorter.

    Attributes:
        num_samples: Number of audio samples of every item.
        num_semantic: Number of semantic tokens, `[b]`.
        num_frames: Number of acoustic frames, `[b]`.
        semantic: Prompt of semantic tokens `[t_i, 1]` of every item; all semantic tokens if the request contains them.
        acoustic: Prompt of acoustic tokens `[f_i, q]` of every item.
        frames_per_token: Number of acoustic frames per semantic token.
    """

    num_samples: list[int]
    num_semantic: Tensor
    num_frames: Tensor
    semantic: list[Tensor]
    acoustic: list[Tensor]
    frames_per_token: Fraction

    @property
    def batch(self) -> int:
        """Number of items b."""
        return len(self.num_samples)

    def frames_for(self, num_semantic: Tensor) -> Tensor:
        """Return the number of acoustic frames `[b]` of items with `num_semantic [b]` semantic tokens."""
        frames = _covering_frames(num_semantic, self.frames_per_token)
        return torch.where(num_semantic < self.num_semantic, frames.minimum(self.num_frames), self.num_frames)


def plan_lengths(
    request: GenerationRequest,
    wav2vec: SemanticTokenizer,
    codec: Codec,
    semantic_stage: StageTransformer,
    device: torch.device,
) -> GenerationLengths:
    """Compute the lengths of all items, and tokenize their prompts on `device`.

    Raises:
        ValueError: If prompts or semantic tokens are invalid, a prompt is longer than the requested seconds, or the
            request has too few semantic tokens.
    """
    factor = codec.downsample_factor
    frames_per_token = Fraction(codec.target_sample_hz, factor) / Fraction(
        wav2vec.target_sample_hz, wav2vec.downsample_factor
    )
    prompt = tokenize_prompts(request, wav2vec, codec, device)
    input_semantic = _input_semantic_tokens(request, semantic_stage)
    if request.seconds is None and input_semantic is not None:
        num_semantic = torch.tensor([len(tokens) for tokens in input_semantic])
        num_samples = (_covering_frames(num_semantic, frames_per_token) * factor).tolist()
    else:
        seconds = [
            prompt_seconds + DEFAULT_SECONDS if request.seconds is None else request.seconds
            for prompt_seconds in prompt.seconds
        ]
        num_samples = [samples_covering(length, factor, codec.target_sample_hz) for length in seconds]
        num_semantic = torch.tensor([_num_semantic(n, wav2vec, codec.target_sample_hz) for n in num_samples])
    semantic = prompt.semantic
    if input_semantic is not None:
        if any(len(tokens) < count for tokens, count in zip(input_semantic, num_semantic.tolist())):
            raise ValueError(
                f"seconds={request.seconds} needs {num_semantic.tolist()} semantic tokens per item, the request has "
                f"{[len(tokens) for tokens in input_semantic]}; pass fewer seconds, or seconds=None"
            )
        semantic = [tokens[:count] for tokens, count in zip(input_semantic, num_semantic.tolist())]
    num_frames = torch.tensor([codec.num_frames(n) for n in num_samples])
    for item, requested in enumerate(num_samples):
        if len(prompt.acoustic[item]) > num_frames[item] or len(semantic[item]) > num_semantic[item]:
            raise ValueError(
                f"the prompt of item {item} lasts {prompt.seconds[item]:.2f} s, longer than the requested "
                f"{requested / codec.target_sample_hz:.2f} s (prompt included); request more, or shorten the prompt"
            )
    return GenerationLengths(num_samples, num_semantic, num_frames, semantic, prompt.acoustic, frames_per_token)


def extra_input_tokens(
    inputs: AudioTokens | None, stages: Sequence[StageTransformer], batch: int
) -> dict[str, dict[str, list[Tensor]]]:
    """Return the tokens `[f_i, levels]` of extra input streams for all items, by stage name and stream name.

    Args:
        inputs: Tokens of 1 or b items by stream name. A stream without a rate is optional.
        stages: Stages that can have extra input streams.
        batch: Number of items b.

    Raises:
        ValueError: If `inputs` has an unknown stream, lacks a stream with a rate, or has tokens that do not fit their
            stream.
    """
    inputs = AudioTokens({}, {}) if inputs is None else inputs
    extra = {
        stage.namespace: [
            stream
            for stream in stage.layout.inputs
            if stream.name == stage.sources[stream.name].kind not in ("semantic", "acoustic")
        ]
        for stage in stages
    }
    known = {stream.name for streams in extra.values() for stream in streams}
    if set(inputs.tokens) - known:
        raise ValueError(
            f"input_streams has streams {sorted(inputs.tokens)}, the stages have extra streams {sorted(known)}"
        )
    tokens: dict[str, dict[str, list[Tensor]]] = {}
    for stage in stages:
        streams = extra[stage.namespace]
        names = tuple(stream.name for stream in streams if stream.is_in_time or stream.name in inputs.tokens)
        items = items_of_streams(stage.layout.streams, *stage.streams_of(inputs, names))
        tokens[stage.namespace] = {name: of_items * (batch // len(of_items)) for name, of_items in items.items()}
    return tokens


def _input_semantic_tokens(request: GenerationRequest, stage: StageTransformer) -> list[Tensor] | None:
    """Semantic tokens `[t_i, 1]` of the request for all items; None if the request has none."""
    if request.semantic_tokens is None:
        return None
    name = stage.layout.predicted[0].name
    lengths = {} if request.semantic_lengths is None else {name: request.semantic_lengths}
    items = items_of_streams(stage.layout.streams, {name: request.semantic_tokens}, lengths)[name]
    counts = [len(tokens) for tokens in items]
    if not all(counts):
        raise ValueError(f"semantic_tokens has items of {counts} tokens; pass at least one token per item")
    return items * (request.num_items // len(items))


def _num_semantic(num_samples: int, wav2vec: SemanticTokenizer, sample_hz: int) -> int:
    """Number of semantic tokens of a wave of `num_samples` at `sample_hz`; at least 1."""
    tokenizer_samples = frames_covering(num_samples * wav2vec.target_sample_hz, sample_hz)
    try:
        return max(1, wav2vec.num_frames(tokenizer_samples))
    except ValueError:  # shorter than one token
        return 1


def _covering_frames(num_semantic: Tensor, frames_per_token: Fraction) -> Tensor:
    """Smallest number of acoustic frames that last at least as long as the semantic tokens."""
    return -(-num_semantic * frames_per_token.numerator // frames_per_token.denominator)
