"""A stage with what surrounds it: tokenizers on one side, a conditioner on the other."""

from collections.abc import Callable, Mapping, Sequence

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.units import frames_inside
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.tensors import Conditioner, Conditions, ConditionTensor, TextEncoder
from audiolm_pytorch.generation.decode_session import Decoded
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.windows import decode_in_windows
from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenLoss
from audiolm_pytorch.lm.tokenizing import sample_rates, tokenize
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = [
    "CoarseTransformerWrapper",
    "FineTransformerWrapper",
    "SemanticTransformerWrapper",
    "StageWrapper",
]


class StageWrapper(nn.Module):
    """Trains and samples one stage from waves or tokens, conditioned through the namespace of the stage.

    Args:
        transformer: The stage.
        wav2vec: Semantic tokenizer; needed where the stage's semantic tokens come from waves.
        codec: Codec; needed where the stage's acoustic tokens come from waves.
        audio_conditioner: Makes conditions of texts, waves or codes, for a stage that takes codes (`cond_dim`).
        text_conditioner: Makes conditions of texts, for a stage that takes states of a text encoder (`text_dim`).

    Raises:
        ValueError: If a tokenizer or a conditioner does not fit the stage.
    """

    @beartype
    def __init__(
        self,
        transformer: StageTransformer,
        wav2vec: SemanticTokenizer | None = None,
        codec: Codec | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        check_compatible(transformer, wav2vec, codec, audio_conditioner, text_conditioner)
        self.namespace = transformer.namespace
        self.transformer = transformer
        self.wav2vec = wav2vec
        self.codec = codec
        self.audio_conditioner = audio_conditioner
        self.text_conditioner = text_conditioner

    @beartype
    def condition(
        self,
        *,
        text: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        lengths: Tensor | None = None,
        states: ConditionTensor | None = None,
    ) -> Conditions | None:
        """Make the stage's conditions: codes in the namespace it was trained with, and states of texts.

        A text speaks through all that the stage takes: its codes, unless those of waves or codes are given, and its
        states.

        Args:
            text: Texts, one per item or one for all.
            wavs: Waves `[b, n]` at the conditioner's rate.
            codes: Conditioner codes `[b, q]`.
            lengths: Samples `[b]` of `wavs` that are no padding.
            states: States of the texts, where they were made before (they are the same for all stages).

        Returns:
            The conditions; None if nothing was handed in.

        Raises:
            ValueError: If a conditioner is missing, or the transformer takes no such condition.
        """
        if text is None and wavs is None and codes is None:
            return None
        takes_codes, takes_states = self.transformer.cond_dim is not None, self.transformer.text_dim is not None
        if not (takes_codes or (takes_states and wavs is None and codes is None)):
            raise ValueError(
                f"the {self.namespace} stage takes no such condition: it needs an audio_conditioner and a transformer "
                "with audio_text_condition=True, or for texts a text_conditioner and a transformer with a text_dim"
            )
        texts = [text] if isinstance(text, str) else text
        states = states if takes_states else None
        if takes_states and texts is not None:
            if self.text_conditioner is None:
                raise ValueError(f"the {self.namespace} stage hears texts: it needs a text_conditioner")
            states = self.text_conditioner.forward(texts) if states is None else states
            if wavs is not None or codes is not None:
                texts = None
        made = None
        if takes_codes:
            if self.audio_conditioner is None:
                raise ValueError(f"the {self.namespace} stage takes codes: it needs an audio_conditioner")
            made = self.audio_conditioner.conditioning(
                texts=texts, wavs=wavs, codes=codes, lengths=lengths, namespace=self.namespace
            )
        return Conditions(codes=made, text=states)

    @beartype
    def forward(
        self,
        wave: Tensor | None = None,
        *,
        input_sample_hz: int | None = None,
        tokens: AudioTokens | None = None,
        conditioning: Conditions | None = None,
        ends: Tensor | None = None,
    ) -> TokenLoss:
        """Loss of waves or tokens.

        Args:
            wave: `[b, n]`. With a conditioner and no `conditioning`, the wave conditions itself.
            input_sample_hz: Rate of `wave`; None = the rate of the stage's own tokenizers.
            tokens: Tokens instead of a wave.
            conditioning: The condition.
            ends: `[b]` bool, whether the file really ends here.

        Returns:
            The loss.

        Raises:
            ValueError: If there is not exactly one of wave and tokens, or something needed is missing.
        """
        if wave is not None and tokens is None:
            rates_hz = sample_rates(self.transformer.kinds, self.wav2vec, self.codec)
            given_hz = input_sample_hz or rates_hz[self.transformer.kinds[-1]]
            waves = {kind: resample(wave, given_hz, rate_hz) for kind, rate_hz in rates_hz.items()}
            lengths = {kind: torch.full((len(one),), one.shape[-1]) for kind, one in waves.items()}
            tokens = tokenize(waves, lengths, self.wav2vec, self.codec)
            if conditioning is None and self.audio_conditioner is not None and self.transformer.cond_dim is not None:
                conditioning = self.condition(wavs=resample(wave, given_hz, self.audio_conditioner.sample_hz))
        elif wave is not None or tokens is None:
            raise ValueError("give either a wave or tokens")
        return self.transformer(self.transformer.packed(tokens, ends), conditioning)

    @beartype
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
        """Sample the stage's tokens; longer stretches than it was trained on in windows.

        Args:
            num_frames: Frames wanted, prompt included, `[b]` or one int.
            streams: Given streams, and a prompt of the predicted stream, `[b, f, levels]` by name.
            lengths: True frames of these, `[b]` or one int; streams not named are whole.
            batch_size: Number of items, where `streams` does not tell.
            conditioning: The condition, of 1 or b items.
            settings: How tokens are drawn.
            seeds: Seed or generator of every item.
            callback: Called with frames known and frames wanted.
            allow_eos: Whether an item may end early.

        Returns:
            The predicted stream.

        Raises:
            ValueError: If inputs do not fit the stage.
        """
        return decode_in_windows(
            self.transformer,
            streams or {},
            num_frames,
            window_frames=self.window_frames,
            batch_size=batch_size,
            lengths=lengths,
            conditioning=conditioning,
            settings=settings,
            seeds=seeds,
            callback=callback,
            allow_eos=allow_eos,
        )

    @property
    def window_frames(self) -> int | None:
        """Longest stretch that the stage was trained on, in predicted frames; None = no limit."""
        if self.transformer.max_seconds is None:
            return None
        return frames_inside(self.transformer.max_seconds, self.transformer.layout.predicted[0].exact_hz)


class SemanticTransformerWrapper(StageWrapper):
    """The semantic stage. See `StageWrapper`.

    Args:
        transformer: The stage.
        wav2vec: Semantic tokenizer.
        audio_conditioner: Makes conditions of codes.
        text_conditioner: Makes conditions of texts' states.
    """

    @beartype
    def __init__(
        self,
        transformer: SemanticTransformer,
        wav2vec: SemanticTokenizer | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
    ) -> None:
        super().__init__(transformer, wav2vec, None, audio_conditioner, text_conditioner)


class CoarseTransformerWrapper(StageWrapper):
    """The coarse stage. See `StageWrapper`.

    Args:
        transformer: The stage.
        codec: Codec.
        wav2vec: Semantic tokenizer.
        audio_conditioner: Makes conditions of codes.
        text_conditioner: Makes conditions of texts' states.
    """

    @beartype
    def __init__(
        self,
        transformer: CoarseTransformer,
        codec: Codec | None = None,
        wav2vec: SemanticTokenizer | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
    ) -> None:
        super().__init__(transformer, wav2vec, codec, audio_conditioner, text_conditioner)


class FineTransformerWrapper(StageWrapper):
    """The fine stage. See `StageWrapper`.

    Args:
        transformer: The stage.
        codec: Codec.
        audio_conditioner: Makes conditions of codes.
        text_conditioner: Makes conditions of texts' states.
    """

    @beartype
    def __init__(
        self,
        transformer: FineTransformer,
        codec: Codec | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
    ) -> None:
        super().__init__(transformer, None, codec, audio_conditioner, text_conditioner)
