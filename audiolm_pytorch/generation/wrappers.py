"""Wrappers of a stage with its tokenizers and conditioners; they compute losses of waves and generate tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.waves import checked_wave, with_channels
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, Conditions, TextEncoder
from audiolm_pytorch.generation.decode_session import Decoded
from audiolm_pytorch.generation.inputs import stage_conditions
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.windows import SlidingWindowDecoder
from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenLoss
from audiolm_pytorch.lm.tokenizing import sample_rates, tokenize
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.token_batch import batches_of_streams

__all__ = [
    "CoarseTransformerWrapper",
    "FineTransformerWrapper",
    "SemanticTransformerWrapper",
    "StageWrapper",
]


class StageWrapper(nn.Module):
    """A stage with the tokenizers and conditioners that compute its inputs.

    Args:
        wav2vec: Semantic tokenizer; needed to compute semantic tokens of waves.
        codec: Codec; needed to compute acoustic tokens of waves.
        audio_conditioner: Computes codes of texts or waves; needed by a stage with `audio_text_condition`.
        text_conditioner: Computes states of texts; needed by a stage with `text_dim`.
    """

    stage_class: ClassVar[type[StageTransformer]] = StageTransformer

    @typed
    def __init__(
        self,
        transformer: StageTransformer,
        *,
        wav2vec: SemanticTokenizer | None = None,
        codec: Codec | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, self.stage_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.stage_class.__name__}, got {type(transformer).__name__}"
            )
        check_compatible(transformer, wav2vec, codec, audio_conditioner, text_conditioner)
        self.namespace = transformer.namespace
        self.transformer = transformer
        self.wav2vec = wav2vec
        self.codec = codec
        self.audio_conditioner = audio_conditioner
        self.text_conditioner = text_conditioner

    @typed
    def condition(
        self,
        *,
        text: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Conditions | None:
        """Compute the conditions `codes` and `text` of the stage, see `stage_conditions`."""
        conditioners = self.audio_conditioner, self.text_conditioner
        return stage_conditions(self.transformer, *conditioners, text=text, wavs=wavs, codes=codes)

    @typed
    def forward(
        self,
        wave: Tensor | None = None,
        *,
        input_sample_hz: int | None = None,
        tokens: AudioTokens | None = None,
        conditioning: Conditions | None = None,
        ends: Tensor | None = None,
    ) -> TokenLoss:
        """Compute the loss of waves or tokens.

        Args:
            wave: Waves `[n]`, `[b, n]` or `[b, c, n]`. With `conditioning=None`, the codes of `wave` are the condition.
            input_sample_hz: Sample rate of `wave` in Hz; None = the rate of the tokenizers.
            tokens: Tokens of the stage, instead of `wave`.
            conditioning: Conditions by name, of 1 or b items.
            ends: Mask `[b]` of the items whose file ends after the tokens.
        """
        if wave is not None and tokens is None:
            wave = checked_wave(wave, 1 if self.codec is None else self.codec.channels)
            rates_hz = sample_rates(self.transformer.kinds, self.wav2vec, self.codec)
            wave_hz = input_sample_hz or rates_hz[self.transformer.kinds[-1]]
            waves = {kind: resample(wave, wave_hz, rate_hz) for kind, rate_hz in rates_hz.items()}
            lengths = {kind: torch.full((len(batch),), batch.shape[-1]) for kind, batch in waves.items()}
            tokens = tokenize(waves, lengths, self.wav2vec, self.codec)
            if conditioning is None and self.audio_conditioner is not None and self.transformer.cond_dim is not None:
                conditioning = self.condition(
                    wavs=resample(with_channels(wave, 1)[:, 0], wave_hz, self.audio_conditioner.sample_hz)
                )
        elif wave is not None or tokens is None:
            raise ValueError("got both or neither of wave and tokens; pass exactly one of them")
        return self.transformer(self.transformer.packed(tokens, ends), conditioning)

    @typed
    def generate(
        self,
        num_frames: int | Tensor,
        *,
        streams: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, int | Tensor] | None = None,
        batch_size: int = 1,
        conditioning: Conditions | None = None,
        settings: SamplingSettings | None = None,
        seeds: Sequence[int | torch.Generator] | None = None,
        callback: Callable[[int, int], None] | None = None,
        allow_eos: bool = False,
    ) -> Decoded:
        """Sample the tokens of the stage in windows that have the length of the longest training sequence.

        Args:
            num_frames: Requested frames, prompt included, `[b]` or one int.
            streams: Tokens `[b, f, levels]` of the input streams and of the prompt, by stream name.
            lengths: Number of frames without padding by stream name, `[b]` or one int; a stream without an entry has no
                padding.
            batch_size: Number of items b, used if `streams` is empty.
            conditioning: Conditions by name, of 1 or b items; `SlidingWindowDecoder` documents this and the other
                arguments.
        """
        inputs = batches_of_streams(self.transformer.layout.streams, streams or {}, lengths or {})
        name = self.transformer.layout.predicted[0].name
        decoder = SlidingWindowDecoder(
            self.transformer,
            num_frames,
            prompt=inputs.pop(name, None),
            inputs=inputs,
            window_frames=self.transformer.window_frames,
            batch_size=len(next(iter(streams.values()))) if streams else batch_size,
            conditioning=conditioning,
            settings=settings,
            seeds=seeds,
            callback=callback,
            allow_eos=allow_eos,
        )
        decoder.advance()
        tokens = decoder.tokens.all()
        return Decoded({name: tokens.ids}, {name: tokens.lengths})


class SemanticTransformerWrapper(StageWrapper):
    """The semantic stage; see `StageWrapper`."""

    stage_class = SemanticTransformer


class CoarseTransformerWrapper(StageWrapper):
    """The coarse stage; see `StageWrapper`."""

    stage_class = CoarseTransformer


class FineTransformerWrapper(StageWrapper):
    """The fine stage; see `StageWrapper`."""

    stage_class = FineTransformer
