"""A request in tokens: how many frames of what every item wants, and what it begins with."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import frames_covering, samples_covering
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.generation.prompts import PromptTokens, split_prompts, tokenize_prompts
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.item_tokens import items_of_streams

__all__ = ["GenerationLengths", "extra_tokens", "plan_lengths"]

DEFAULT_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class GenerationLengths:
    """What is to be made of every item.

    Attributes:
        num_samples: Samples wanted at most, of every item.
        num_semantic: Semantic tokens `[b]` wanted at most.
        num_frames: Acoustic frames `[b]` wanted at most.
        semantic: Semantic tokens `[t_i, 1]` that items begin with, or all of them where they are given.
        acoustic: Acoustic tokens `[f_i, q]` that items begin with.
        frames_per_token: Acoustic frames that last as long as a semantic token.
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
        """Acoustic frames `[b]` of items that have so many semantic tokens `[b]` in the end; fewer where they ended."""
        covered = _covered_frames(num_semantic, self.frames_per_token)
        return torch.where(num_semantic < self.num_semantic, covered.minimum(self.num_frames), self.num_frames)


def plan_lengths(
    request: GenerationRequest,
    wav2vec: SemanticTokenizer,
    codec: Codec,
    semantic_stage: StageTransformer,
    device: torch.device,
) -> GenerationLengths:
    """Count what is wanted of every item, and tokenize what it begins with.

    Args:
        request: The request.
        wav2vec: The semantic tokenizer.
        codec: The codec.
        semantic_stage: The stage whose tokens may be given.
        device: Where to compute.

    Returns:
        The plan.

    Raises:
        ValueError: If inputs are no sound, no tokens, or shorter than the seconds asked for.
    """
    batch, factor = request.num_items, codec.downsample_factor
    frames_per_token = Fraction(codec.target_sample_hz, factor) / Fraction(
        wav2vec.target_sample_hz, wav2vec.downsample_factor
    )
    prime = _prime(request, batch, wav2vec, codec, device)
    given = _given_semantic(request, batch, semantic_stage)
    if request.seconds is None and given is not None:
        counts = torch.tensor([len(tokens) for tokens in given])
        num_samples = (_covered_frames(counts, frames_per_token) * factor).tolist()
    else:
        seconds = [own + DEFAULT_SECONDS if request.seconds is None else request.seconds for own in prime.seconds]
        num_samples = [samples_covering(one, factor, codec.target_sample_hz) for one in seconds]
        counts = torch.tensor([_num_semantic(n, wav2vec, codec.target_sample_hz) for n in num_samples])
    semantic = prime.semantic
    if given is not None:
        if any(len(tokens) < count for tokens, count in zip(given, counts.tolist())):
            raise ValueError(
                f"{request.seconds} s need {counts.tolist()} semantic tokens, the items have "
                f"{[len(tokens) for tokens in given]}: ask for fewer seconds, or leave seconds out"
            )
        semantic = [tokens[:count] for tokens, count in zip(given, counts.tolist())]
    num_frames = torch.tensor([codec.num_frames(n) for n in num_samples])
    for item, wanted in enumerate(num_samples):
        if len(prime.acoustic[item]) > num_frames[item] or len(semantic[item]) > counts[item]:
            raise ValueError(
                f"the prime of item {item} lasts {prime.seconds[item]:.2f} s, longer than what is wanted, "
                f"{wanted / codec.target_sample_hz:.2f} s, which counts the prime in: ask for more seconds, or cut it"
            )
    return GenerationLengths(num_samples, counts, num_frames, semantic, prime.acoustic, frames_per_token)


def extra_tokens(
    given: AudioTokens | None, stages: Sequence[StageTransformer], batch: int
) -> dict[str, dict[str, list[Tensor]]]:
    """Tokens of the extra streams of stages.

    Args:
        given: What is given, by name of the stream, of 1 or b items.
        stages: The stages.
        batch: Number of items b.

    Returns:
        Tokens `[f_i, levels]` of all items, by namespace and stream; without those that may be absent and are.

    Raises:
        ValueError: If a stream is unknown, or is missing though it is in time, or its tokens do not fit it.
    """
    given = AudioTokens({}, {}) if given is None else given
    extra = {
        stage.namespace: [
            one
            for one in stage.layout.inputs
            if one.name == stage.sources[one.name].kind not in ("semantic", "acoustic")
        ]
        for stage in stages
    }
    known = {one.name for streams in extra.values() for one in streams}
    if set(given.tokens) - known:
        raise ValueError(f"given holds tokens of {sorted(given.tokens)}, the stages have extra streams {sorted(known)}")
    found: dict[str, dict[str, list[Tensor]]] = {}
    for stage in stages:
        heard = tuple(one.name for one in extra[stage.namespace] if one.is_in_time or one.name in given.tokens)
        items = items_of_streams(stage.layout.streams, *stage.streams_of(given, heard))
        found[stage.namespace] = {name: tokens * (batch // len(tokens)) for name, tokens in items.items()}
    return found


def _prime(
    request: GenerationRequest, batch: int, wav2vec: SemanticTokenizer, codec: Codec, device: torch.device
) -> PromptTokens:
    """Tokens of the primes of all items; empty ones where there are none."""
    silence = torch.zeros(1, 0), codec.target_sample_hz
    waves = [silence]
    if request.prime_wave is not None:
        rate_hz = request.prime_wave_input_sample_hz or codec.target_sample_hz
        waves = split_prompts(request.prime_wave, rate_hz, request.prime_lengths)
    tokens = tokenize_prompts(waves, wav2vec, codec, device)
    copies = batch // len(waves)
    return PromptTokens(tokens.semantic * copies, tokens.acoustic * copies, tokens.seconds * copies)


def _given_semantic(request: GenerationRequest, batch: int, stage: StageTransformer) -> list[Tensor] | None:
    """Semantic tokens `[t_i, 1]` of all items that are given from outside; None = the stage is to make them."""
    if request.semantic_tokens is None:
        return None
    name = stage.layout.predicted[0].name
    lengths = {} if request.semantic_lengths is None else {name: request.semantic_lengths}
    streams = {name: request.semantic_tokens}
    items = items_of_streams(stage.layout.streams, streams, lengths)[name]
    if not all(len(tokens) for tokens in items):
        raise ValueError(
            f"semantic_tokens hold {[len(tokens) for tokens in items]} tokens: each item needs one or more"
        )
    return items * (batch // len(items))


def _num_semantic(num_samples: int, wav2vec: SemanticTokenizer, sample_hz: int) -> int:
    """Semantic tokens of as long a stretch as `num_samples` at another rate; one at the least."""
    own_samples = frames_covering(num_samples * wav2vec.target_sample_hz, sample_hz)
    try:
        return max(1, wav2vec.num_frames(own_samples))
    except ValueError:  # shorter than one
        return 1


def _covered_frames(num_semantic: Tensor, frames_per_token: Fraction) -> Tensor:
    """Fewest acoustic frames that last as long as so many semantic tokens."""
    return -(-num_semantic * frames_per_token.numerator // frames_per_token.denominator)
