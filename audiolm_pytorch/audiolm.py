"""AudioLM (arXiv:2209.03143, sec. III): semantic, coarse and fine tokens, one after another, to the codec's decoder."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio import resample
from audiolm_pytorch.codecs.protocol import Codec
from audiolm_pytorch.conditioning import Conditioner, Conditions
from audiolm_pytorch.sampling import SamplingSettings
from audiolm_pytorch.semantic.protocol import SemanticTokenizer
from audiolm_pytorch.stages.stage_transformer import AudioTokens
from audiolm_pytorch.stages.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.stages.tokenizing import tokenize
from audiolm_pytorch.stages.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
    StageWrapper,
)
from audiolm_pytorch.units import frames_covering, samples_covering

__all__ = ["AudioLM", "GeneratedAudio"]

DEFAULT_SECONDS = 5.0
# MusicLM, sec. 4.2; AudioLM used 0.6, 0.8, 0.6 for speech.
DEFAULT_SAMPLING = {
    "semantic": SamplingSettings(temperature=1.0),
    "coarse": SamplingSettings(temperature=0.95),
    "fine": SamplingSettings(temperature=0.4),
}

Sampling = Mapping[str, "SamplingSettings | Mapping[str, Any]"]


@dataclass(frozen=True)
class GeneratedAudio:
    """What one call generated.

    Attributes:
        wave: `[b, n]` (`[b, c, n]` for a codec of several channels), float.
        sample_hz: Its rate (Hz).
        semantic: Semantic tokens `[b, t]` int64.
        acoustic: Acoustic tokens `[b, f, q]` int64.
    """

    wave: Tensor
    sample_hz: int
    semantic: Tensor
    acoustic: Tensor


class AudioLM(nn.Module):
    """Generates audio through semantic tokens, coarse and fine acoustic tokens and a codec.

    Args:
        wav2vec: Semantic tokenizer that the stages were trained with.
        codec: Codec that the stages were trained with.
        semantic_transformer: First stage.
        coarse_transformer: Second stage.
        fine_transformer: Third stage; None = the coarse stage predicts all levels that are decoded.
        audio_conditioner: Makes conditions of texts, waves or codes, in a namespace per stage.
        sampling: Sampling of stages by name, as settings or as the fields that differ from MusicLM's temperatures.

    Raises:
        ValueError: If stages, tokenizers and conditioner do not fit one another, or a stage was trained on tokens of
            other tokenizers.
    """

    @beartype
    def __init__(
        self,
        *,
        wav2vec: SemanticTokenizer,
        codec: Codec,
        semantic_transformer: SemanticTransformer,
        coarse_transformer: CoarseTransformer,
        fine_transformer: FineTransformer | None = None,
        audio_conditioner: Conditioner | None = None,
        sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.wav2vec = wav2vec
        self.codec = codec
        self.audio_conditioner = audio_conditioner
        self.semantic = SemanticTransformerWrapper(semantic_transformer, wav2vec, audio_conditioner)
        self.coarse = CoarseTransformerWrapper(coarse_transformer, codec, wav2vec, audio_conditioner)
        self.fine = None
        if fine_transformer is not None:
            self.fine = FineTransformerWrapper(fine_transformer, codec, audio_conditioner)
            predicted, given = coarse_transformer.sources["coarse"], fine_transformer.sources["coarse"]
            if predicted != given:
                raise ValueError(
                    f"the coarse stage predicts {predicted.num_levels} levels, the fine one reads {given.num_levels}"
                )
        self.sampling = _changed(DEFAULT_SAMPLING, sampling or {})

    @property
    def stages(self) -> dict[str, StageWrapper]:
        """The stages by namespace, in order."""
        stages: tuple[StageWrapper, ...] = (self.semantic, self.coarse)
        return {stage.namespace: stage for stage in (*stages, *([] if self.fine is None else [self.fine]))}

    @property
    def device(self) -> torch.device:
        """Where the stages run."""
        return self.semantic.transformer.device

    def forward(self, **request: Any) -> Tensor:
        """Generate audio.

        Args:
            **request: As for `generate`.

        Returns:
            The wave `[b, n]` at the codec's rate.
        """
        return self.generate(**request).wave

    @torch.inference_mode()
    @beartype
    def generate(
        self,
        *,
        batch_size: int = 1,
        seconds: float | int | None = None,
        text: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        conditioning: Mapping[str, Conditions] | None = None,
        prime_wave: Tensor | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_lengths: Tensor | None = None,
        seeds: int | Sequence[int] | None = None,
        sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None,
        callback: Callable[[str, int, int], None] | None = None,
    ) -> GeneratedAudio:
        """Generate audio: unconditional, conditioned, or continuing a wave; all items as one batch.

        Args:
            batch_size: Number of items b; where texts, codes, conditions, primes or seeds are several, their number.
            seconds: Length of the result, a prime included, rounded up to whole codec frames. None = 5, or 5 more than
                the prime.
            text: Texts that condition, through the conditioner.
            wavs: Waves `[b, n]` that condition, at the conditioner's rate.
            codes: Conditioner codes `[b, q]` that condition.
            conditioning: Finished conditions by stage name, each made in the namespace of its stage; stages not named
                are unconditional, or follow text, wavs or codes.
            prime_wave: Wave `[n]` or `[b, n]` to continue; its semantic and its acoustic tokens are the prompts.
            prime_wave_input_sample_hz: Its rate (Hz); None = the codec's.
            prime_lengths: Samples `[b]` of each prime that are no padding.
            seeds: Seed of every item (an int n means n, n + 1, ...): an item depends on nothing but its own seed and
                inputs. None draws them from torch's global generator.
            sampling: Sampling of stages by name, as settings or as the fields that differ from the constructor's. The
                constructor's guidance rests where a stage has no condition to be guided by.
            callback: Called as `callback(stage, frames_known, frames_wanted)`.

        Returns:
            The audio and its tokens.

        Raises:
            ValueError: If inputs do not fit one another, or the prime is not shorter than what is wanted.
        """
        conditions = self._conditions(conditioning or {}, text=text, wavs=wavs, codes=codes)
        prime_wave = prime_wave.unsqueeze(0) if prime_wave is not None and prime_wave.ndim == 1 else prime_wave
        batch = _batch_size(batch_size, prime_wave, None if isinstance(seeds, int) else seeds, *conditions.values())
        prime, prime_seconds = self._prime(prime_wave, prime_wave_input_sample_hz, prime_lengths, batch)
        wanted_seconds = prime_seconds + DEFAULT_SECONDS if seconds is None else seconds
        unguided = [name for name, condition in conditions.items() if condition is None]
        settings = _changed(_changed(self.sampling, dict.fromkeys(unguided, {"guidance_scale": 1.0})), sampling or {})
        first_seed = torch.randint(2**62, (batch,)).tolist() if seeds is None else seeds
        item_seeds = [first_seed + i for i in range(batch)] if isinstance(first_seed, int) else list(first_seed)

        def run(stage: StageWrapper, num_frames: int, given: dict[str, Tensor]) -> Tensor:
            """Complete the predicted stream of one stage, prompted by the prime."""
            target = stage.transformer.layout.predicted[0].name
            prompt, lengths = stage.transformer.streams_of(prime, (target,)) if prime else ({}, {})
            name = stage.namespace
            decoded = stage.generate(
                num_frames,
                streams={**given, **prompt},
                lengths=lengths,
                batch_size=batch,
                conditioning=conditions[name],
                settings=settings[name],
                seeds=[_stage_generator(seed, name) for seed in item_seeds],
                callback=None if callback is None else lambda known, wanted: callback(name, known, wanted),
            )
            return decoded.streams[target]

        num_samples = samples_covering(wanted_seconds, self.codec.downsample_factor, self.codec.target_sample_hz)
        num_frames = self.codec.num_frames(num_samples)
        semantic = run(self.semantic, self._semantic_frames(num_samples), {})
        acoustic = run(self.coarse, num_frames, {"semantic": semantic})
        if self.fine is not None:
            acoustic = torch.cat((acoustic, run(self.fine, num_frames, {"coarse": acoustic})), dim=-1)
        wave = self.codec.decode_from_codebook_indices(acoustic, num_samples=num_samples)
        wave = wave[:, 0] if wave.shape[1] == 1 else wave
        return GeneratedAudio(wave, self.codec.target_sample_hz, semantic[..., 0], acoustic)

    def _conditions(self, finished: Mapping[str, Conditions], **described: Any) -> dict[str, Conditions | None]:
        """Condition of every stage: a finished one, or one made in its own namespace; None = unconditional."""
        unknown = set(finished) - set(self.stages)
        if unknown:
            raise ValueError(f"conditioning is by stage, of {list(self.stages)}; got {sorted(unknown)}")
        takers = [name for name, stage in self.stages.items() if stage.transformer.cond_dim is not None]
        conditions: dict[str, Conditions | None] = dict.fromkeys(self.stages)
        # Where no stage takes a condition, each may say so itself.
        for name in takers or self.stages:
            conditions[name] = finished[name] if name in finished else self.stages[name].condition(**described)
        return {**conditions, **finished}

    def _semantic_frames(self, num_samples: int) -> int:
        """Semantic tokens of as long a stretch as `num_samples` at the codec's rate."""
        own_samples = frames_covering(num_samples * self.wav2vec.target_sample_hz, self.codec.target_sample_hz)
        return max(1, self.wav2vec.num_frames(own_samples))

    def _prime(
        self, wave: Tensor | None, input_hz: int | None, lengths: Tensor | None, batch: int
    ) -> tuple[AudioTokens | None, float]:
        """Tokens of the primes, whole frames only, and the length of the longest prime in seconds."""
        if wave is None:
            return None, 0.0
        given_hz = input_hz or self.codec.target_sample_hz
        wave = wave.expand(batch, -1).to(self.device)
        counts = torch.full((batch,), wave.shape[-1]) if lengths is None else lengths.cpu().expand(batch)
        tokenizers: dict[str, SemanticTokenizer | Codec] = {"semantic": self.wav2vec, "acoustic": self.codec}
        waves = {kind: resample(wave, given_hz, one.target_sample_hz) for kind, one in tokenizers.items()}
        samples = {kind: counts * one.target_sample_hz // given_hz for kind, one in tokenizers.items()}
        tokens = tokenize(waves, samples, self.wav2vec, self.codec)
        # A frame that the prime ends inside of would tell the model that sound stops there.
        whole = {kind: samples[kind] // one.downsample_factor for kind, one in tokenizers.items()}
        frames = {kind: torch.minimum(tokens.lengths[kind], count) for kind, count in whole.items()}
        return AudioTokens(tokens.tokens, frames), float(counts.max()) / given_hz


def _batch_size(batch_size: int, *several: Tensor | Conditions | Sequence[int] | None) -> int:
    """Number of items that all inputs agree on; inputs of one item are given to all."""
    sizes = {len(one) for one in several if one is not None and len(one) != 1} | ({batch_size} - {1})
    if len(sizes) > 1:
        raise ValueError(
            f"texts, conditions, primes, seeds and batch_size speak of different numbers of items: {sizes}"
        )
    return sizes.pop() if sizes else 1


def _changed(settings: Mapping[str, SamplingSettings], changes: Sampling) -> dict[str, SamplingSettings]:
    """Settings by stage name with some of them exchanged, whole or field by field."""
    unknown = set(changes) - set(DEFAULT_SAMPLING)
    if unknown:
        raise ValueError(f"sampling is by stage, of {sorted(DEFAULT_SAMPLING)}; got {sorted(unknown)}")
    changed = {
        name: one if isinstance(one, SamplingSettings) else replace(settings[name], **one)
        for name, one in changes.items()
    }
    return {**settings, **changed}


def _stage_generator(seed: int, stage: str) -> torch.Generator:
    """Generator of one item in one stage: stages must not share noise, or their tokens would be correlated."""
    digest = hashlib.sha256(f"{stage}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
