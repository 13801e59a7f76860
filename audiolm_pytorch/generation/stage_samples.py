"""Audible samples of a stage that predicts acoustic tokens, for held-out recordings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditions
from audiolm_pytorch.generation.sampling import DEFAULT_SAMPLING
from audiolm_pytorch.generation.wrappers import StageWrapper
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.training.samples import Sample

__all__ = ["StageSampler"]

_MAX_SECONDS = 5.0


@typed
@dataclass(frozen=True, eq=False)
class StageSampler:
    """Samples the levels that a stage predicts, given the other tokens of recordings, and decodes them by a codec.

    The samples sound as in generation with earlier stages that make no mistake. Levels of later stages are missing.
    """

    codec: Codec

    @torch.no_grad()
    def __call__(
        self,
        transformer: StageTransformer,
        tokens: AudioTokens,
        conditions: Conditions,
        texts: Sequence[str | None],
    ) -> list[Sample]:
        """Return one sample for each recording in `tokens`."""
        predicted, codec = transformer.layout.predicted[0], self.codec.to(transformer.device).eval()
        source = transformer.sources[predicted.name]
        streams, lengths = transformer.streams_of(tokens)
        inputs = {stream.name: streams[stream.name] for stream in transformer.layout.inputs}
        longest = int(_MAX_SECONDS * predicted.exact_hz)
        num_frames = torch.as_tensor(lengths[predicted.name]).expand(len(texts)).clamp(max=longest)
        sampled = StageWrapper(transformer).generate(
            num_frames,
            streams=inputs,
            lengths={name: lengths[name] for name in inputs},
            batch_size=len(texts),
            conditioning=conditions or None,
            settings=DEFAULT_SAMPLING.get(transformer.namespace),
            seeds=list(range(len(texts))),
        )
        known, samples = tokens.tokens["acoustic"][..., : source.first_level], []
        for number, (text, count) in enumerate(zip(texts, num_frames.tolist(), strict=True)):
            codes = sampled.streams[predicted.name][number, :count]
            levels = torch.cat([known[number, :count].to(codes.device), codes], dim=-1)
            wave = codec.decode_from_codebook_indices(levels[None])[0]
            samples.append(Sample(str(number + 1), wave, codec.target_sample_hz, text or "", codes))
        return samples
