"""The inputs of all stages for a generation request: lengths, prompts, extra input streams and conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isinf
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import frames_covering, samples_covering
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, Conditions, ConditionTensor, TextEncoder
from audiolm_pytorch.generation.prompts import tokenize_prompts
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.token_batch import TokenBatch, batches_of_streams

__all__ = [
    "GenerationLengths",
    "change_frames",
    "extra_input_tokens",
    "plan_lengths",
    "request_conditions",
    "stage_conditions",
]

DEFAULT_SECONDS = 5.0
_NEVER = 2**62  # a frame after the end of every item


@dataclass(frozen=True, eq=False)
class GenerationLengths:
    """Requested lengths `[b]` and prompt tokens. If a stage samples an end token, the item becomes shorter.

    Attributes:
        semantic: Prompt of semantic tokens, or all semantic tokens if the request contains them.
        acoustic: Prompt of acoustic tokens of all levels.
    """

    num_samples: list[int]
    num_semantic: Tensor
    num_frames: Tensor
    semantic: TokenBatch
    acoustic: TokenBatch


def plan_lengths(
    request: GenerationRequest,
    wav2vec: SemanticTokenizer,
    codec: Codec,
    semantic_stage: StageTransformer,
    device: torch.device,
) -> GenerationLengths:
    """Compute the lengths of all items, and tokenize their prompts on `device`."""
    factor = codec.downsample_factor
    frames_per_token = Fraction(codec.target_sample_hz, factor) / Fraction(
        wav2vec.target_sample_hz, wav2vec.downsample_factor
    )
    batch = request.num_items
    semantic, acoustic = TokenBatch.empty(batch, 1), TokenBatch.empty(batch, codec.num_quantizers)
    prompt_seconds = [0.0] * batch
    if request.prime_wave is not None:
        semantic, acoustic, prompt_seconds = tokenize_prompts(request, wav2vec, codec, device)
    input_semantic = _input_semantic_tokens(request, semantic_stage)
    if request.seconds is None and input_semantic is not None:
        num_semantic = input_semantic.lengths
        num_samples = (_covering_frames(num_semantic, frames_per_token) * factor).tolist()
    else:
        seconds = [request.seconds if request.seconds is not None else DEFAULT_SECONDS + s for s in prompt_seconds]
        num_samples = [samples_covering(length, factor, codec.target_sample_hz) for length in seconds]
        num_semantic = torch.tensor([_num_semantic(n, wav2vec, codec.target_sample_hz) for n in num_samples])
    if input_semantic is not None:
        if (input_semantic.lengths < num_semantic).any():
            raise ValueError(
                f"seconds={request.seconds} needs {num_semantic.tolist()} semantic tokens per item, the request has "
                f"{input_semantic.lengths.tolist()}; pass fewer seconds, or seconds=None"
            )
        semantic = input_semantic.truncate(num_semantic)
    num_frames = torch.tensor([codec.num_frames(n) for n in num_samples])
    is_too_long = (acoustic.lengths > num_frames) | (semantic.lengths > num_semantic)
    for item in is_too_long.nonzero().flatten().tolist():
        raise ValueError(
            f"the prompt of item {item} lasts {prompt_seconds[item]:.2f} s, longer than the requested "
            f"{num_samples[item] / codec.target_sample_hz:.2f} s (prompt included); request more, or shorten the prompt"
        )
    return GenerationLengths(num_samples, num_semantic, num_frames, semantic, acoustic)


def change_frames(request: GenerationRequest, wav2vec: SemanticTokenizer, codec: Codec) -> list[tuple[Tensor, Tensor]]:
    """Return the first semantic token and the first acoustic frame, both `[b]`, of every change of conditions.

    The numbers are the lengths of music that ends at the change.
    """

    def position(seconds: float) -> tuple[int, int]:
        if not seconds > 0:
            raise ValueError(f"conditions must change after more than 0 seconds, got {seconds}")
        if isinf(seconds):
            return _NEVER, _NEVER
        num_samples = samples_covering(seconds, codec.downsample_factor, codec.target_sample_hz)
        return _num_semantic(num_samples, wav2vec, codec.target_sample_hz), codec.num_frames(num_samples)

    positions = [torch.tensor([*map(position, change.seconds.tolist())]) for change in request.condition_changes]
    return [(frames[:, 0], frames[:, 1]) for frames in positions]


def extra_input_tokens(
    inputs: AudioTokens | None, stages: Sequence[StageTransformer], batch: int
) -> dict[str, dict[str, TokenBatch]]:
    """Return the tokens of extra input streams for all items, by stage name and stream name.

    Args:
        inputs: Tokens of 1 or b items by stream name; a stream without a frame rate is optional.
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
            f"got the input_streams {sorted(inputs.tokens)}, the stages accept only {sorted(known)}; omit the others"
        )
    tokens: dict[str, dict[str, TokenBatch]] = {}
    for stage in stages:
        streams = extra[stage.namespace]
        names = tuple(stream.name for stream in streams if stream.is_in_time or stream.name in inputs.tokens)
        batches = batches_of_streams(stage.layout.streams, *stage.streams_of(inputs, names))
        tokens[stage.namespace] = {name: tokens_of_stream.expand(batch) for name, tokens_of_stream in batches.items()}
    return tokens


def request_conditions(
    request: GenerationRequest,
    stages: Mapping[str, StageTransformer],
    audio_conditioner: Conditioner | None,
    text_conditioner: TextEncoder | None,
) -> dict[str, Conditions]:
    """Return the conditions of all stages by stage name; conditions that the request lacks are computed."""
    finished = request.conditioning or {}
    unknown = set(finished) - set(stages)
    if unknown:
        raise ValueError(f"got conditioning for unknown stages {sorted(unknown)}; the stages are {list(stages)}")
    states = None
    needs_states = any(stage.text_dim and name not in finished for name, stage in stages.items())
    if request.text is not None and text_conditioner is not None and needs_states:
        states = text_conditioner.forward(request.text)  # once, because all stages use the same states
    conditioners = audio_conditioner, text_conditioner
    inputs: dict[str, Any] = {"text": request.text, "wavs": request.wavs, "codes": request.codes, "states": states}
    further = {name: ConditionTensor.of(value) for name, value in (request.conditions or {}).items()}
    accepted = {name for stage in stages.values() for name in stage.fuser.specs}
    if not further.keys() <= accepted:
        raise ValueError(f"got the conditions {sorted(further)}, the stages accept {sorted(accepted)}")
    if "codes" not in accepted and ("text" not in accepted or request.wavs is not None or request.codes is not None):
        # Raises an error if there are inputs, because no stage uses them.
        stage_conditions(next(iter(stages.values())), *conditioners, **inputs)
    conditions: dict[str, Conditions] = {}
    for name, stage in stages.items():
        names = stage.fuser.specs.keys()
        of_stage: Conditions | None = None
        if name in finished:
            of_stage = finished[name]
        elif "codes" in names:
            of_stage = stage_conditions(stage, *conditioners, **inputs)
        elif "text" in names:
            of_stage = stage_conditions(stage, *conditioners, text=request.text, states=states)
        conditions[name] = {key: further[key] for key in names & further.keys()} | dict(of_stage or {})
    return conditions


def stage_conditions(
    stage: StageTransformer,
    audio_conditioner: Conditioner | None,
    text_conditioner: TextEncoder | None,
    *,
    text: str | Sequence[str] | None = None,
    wavs: Tensor | None = None,
    codes: Tensor | None = None,
    states: ConditionTensor | None = None,
) -> Conditions | None:
    """Compute the conditions `codes` and `text` of a stage. Return None if no text, wave or code is passed.

    States are computed from the text. Codes are also computed from the text, unless `wavs` or `codes` is passed.

    Args:
        wavs: Waves `[b, n]` at the sample rate of the audio conditioner.
        codes: Codes `[b, q]` of the audio conditioner.
        states: Precomputed states of the texts, which all stages share; None = computed from `text`.
    """
    if text is None and wavs is None and codes is None:
        return None
    accepts_codes, accepts_states = stage.cond_dim is not None, stage.text_dim is not None
    if not (accepts_codes or (accepts_states and wavs is None and codes is None)):
        raise ValueError(
            f"the {stage.namespace} stage does not accept the passed text, wavs or codes: it needs an "
            "audio_conditioner and a transformer with audio_text_condition=True, or for texts a text_conditioner and a "
            "transformer with a text_dim"
        )
    texts = [text] if isinstance(text, str) else text
    conditions: dict[str, ConditionTensor] = {}
    if accepts_states and texts is not None:
        if text_conditioner is None:
            raise ValueError(f"the {stage.namespace} stage is conditioned on texts; pass a text_conditioner")
        conditions["text"] = text_conditioner.forward(texts) if states is None else states
        if wavs is not None or codes is not None:
            texts = None
    if accepts_codes:
        if audio_conditioner is None:
            raise ValueError(f"the {stage.namespace} stage is conditioned on codes; pass an audio_conditioner")
        conditions["codes"] = audio_conditioner.conditioning(
            texts=texts, wavs=wavs, codes=codes, namespace=stage.namespace
        )
    return conditions


def _input_semantic_tokens(request: GenerationRequest, stage: StageTransformer) -> TokenBatch | None:
    """Semantic tokens of the request for all items; None if the request has none."""
    if request.semantic_tokens is None:
        return None
    name = stage.layout.predicted[0].name
    lengths = {} if request.semantic_lengths is None else {name: request.semantic_lengths}
    tokens = batches_of_streams(stage.layout.streams, {name: request.semantic_tokens}, lengths)[name]
    if not tokens.lengths.all():
        raise ValueError(
            f"semantic_tokens has items of {tokens.lengths.tolist()} tokens; pass at least one token per item"
        )
    return tokens.expand(request.num_items)


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
