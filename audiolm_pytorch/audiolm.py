"""AudioLM (arXiv:2209.03143, sec. III): semantic, coarse and fine tokens, one after another, to the codec's decoder."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.cascade import StageRun, TokenCascade
from audiolm_pytorch.codecs.protocol import Codec, StreamingCodec
from audiolm_pytorch.conditioning import Conditioner, Conditions, TextEncoder
from audiolm_pytorch.generation import GeneratedAudio, GenerationRequest, StageBars
from audiolm_pytorch.generation_plan import GenerationPlan, extra_tokens, plan_generation
from audiolm_pytorch.half_weights import with_half_weights
from audiolm_pytorch.sampling import SamplingSettings
from audiolm_pytorch.semantic.protocol import SemanticTokenizer
from audiolm_pytorch.stages.fit import check_stages
from audiolm_pytorch.stages.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.stages.windows import WindowedDecoding
from audiolm_pytorch.stages.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
    StageWrapper,
)
from audiolm_pytorch.token_waves import WaveStreams, decode_items
from audiolm_pytorch.units import frames_covering, samples_covering

__all__ = ["AudioLM", "GeneratedAudio"]

# MusicLM, sec. 4.2; AudioLM used 0.6, 0.8, 0.6 for speech.
DEFAULT_SAMPLING = {
    "semantic": SamplingSettings(temperature=1.0),
    "coarse": SamplingSettings(temperature=0.95),
    "fine": SamplingSettings(temperature=0.4),
}

Sampling = Mapping[str, "SamplingSettings | Mapping[str, Any]"]


class AudioLM(nn.Module):
    """Generates audio through semantic tokens, coarse and fine acoustic tokens and a codec.

    Args:
        wav2vec: Semantic tokenizer that the stages were trained with.
        codec: Codec that the stages were trained with.
        semantic_transformer: First stage.
        coarse_transformer: Second stage.
        fine_transformer: Third stage; None = the coarse stage predicts all levels that are decoded.
        audio_conditioner: Makes conditions of texts, waves or codes, in a namespace per stage, for stages with a
            `cond_dim`.
        text_conditioner: Makes conditions of texts, for stages with a `text_dim`.
        sampling: Sampling of stages by name, as settings or as the fields that differ from MusicLM's temperatures.

    Raises:
        ValueError: If stages, tokenizers and conditioners do not fit one another, or a stage was trained on tokens of
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
        text_conditioner: TextEncoder | None = None,
        sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.wav2vec = wav2vec
        self.codec = codec
        self.audio_conditioner = audio_conditioner
        self.text_conditioner = text_conditioner
        speakers = audio_conditioner, text_conditioner
        self.semantic = SemanticTransformerWrapper(semantic_transformer, wav2vec, *speakers)
        self.coarse = CoarseTransformerWrapper(coarse_transformer, codec, wav2vec, *speakers)
        self.fine = None if fine_transformer is None else FineTransformerWrapper(fine_transformer, codec, *speakers)
        check_stages(*(stage.transformer for stage in self.stages.values()))
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

    def with_half_weights(self) -> "AudioLM":
        """A copy for generating whose stages have bfloat16 weights (see `with_half_weights`); the rest is shared."""
        halves: dict[str, Any] = {
            f"{name}_transformer": with_half_weights(stage.transformer) for name, stage in self.stages.items()
        }
        return AudioLM(
            wav2vec=self.wav2vec,
            codec=self.codec,
            audio_conditioner=self.audio_conditioner,
            text_conditioner=self.text_conditioner,
            sampling=self.sampling,
            **halves,
        )

    def forward(self, **request: Any) -> Tensor | list[Tensor]:
        """Generate audio.

        Args:
            **request: See `GenerationRequest`.

        Returns:
            Waves `[b, n]` (`[b, c, n]` for a codec of several channels) at the codec's rate; a list of waves where
            items differ in length.
        """
        made = self.generate(**request)
        return made.wave if made.have_one_length else made.waves

    @torch.inference_mode()
    def generate(self, **request: Any) -> GeneratedAudio:
        """Generate audio: unconditional, conditioned, continuing waves, or of semantic tokens; all items as one batch.

        Args:
            **request: See `GenerationRequest`.

        Returns:
            The audio and its tokens.

        Raises:
            ValueError: If inputs do not fit one another or the model, or a prime is longer than what is wanted.
        """
        wish, bars = GenerationRequest(**request), StageBars()
        plan = self._plan(wish)
        try:
            cascade = self._cascade(wish, plan, bars)
            cascade.finish()
            semantic, acoustic = cascade.take()
        finally:
            bars.close()
        num_samples = [
            min(most, len(tokens) * self.codec.downsample_factor) for most, tokens in zip(plan.num_samples, acoustic)
        ]
        waves = decode_items(self.codec, acoustic, num_samples)
        return GeneratedAudio.of_items(waves, self.codec.target_sample_hz, semantic, acoustic)

    def stream(self, *, chunk_seconds: float | int = 1.0, **request: Any) -> Iterator[GeneratedAudio]:
        """Generate audio and give it out while it is made; every stage works only as far as the next chunk needs.

        Args:
            chunk_seconds: New sound to wait for at the least, before it is given out; more where a window ends or the
                codec holds sound back, less at the end.
            **request: See `GenerationRequest`.

        Returns:
            The chunks. Put together (see `GeneratedAudio.joined`) they are what `generate` gives for the same request;
            semantic tokens come early, since coarse ones wait for all that their window covers.

        Raises:
            ValueError: If the codec cannot decode while codes are still coming in, or as in `generate`.
        """
        codec = self.codec
        if not isinstance(codec, StreamingCodec):
            raise ValueError(
                f"{type(codec).__name__} does not decode streams: use generate, or a codec with a decoder_stream, "
                "such as SoundStream"
            )
        if not 0 < chunk_seconds < float("inf"):
            raise ValueError(f"chunk_seconds must be positive and finite, got {chunk_seconds}")
        step = frames_covering(
            samples_covering(chunk_seconds, codec.downsample_factor, codec.target_sample_hz), codec.downsample_factor
        )
        with torch.inference_mode():
            wish, bars = GenerationRequest(**request), StageBars()
            plan = self._plan(wish)
            cascade, waves = self._cascade(wish, plan, bars), WaveStreams(codec, plan.num_samples)
        return _chunks(cascade, waves, bars, step, codec.target_sample_hz)

    # a request as stages at work

    def _plan(self, request: GenerationRequest) -> GenerationPlan:
        return plan_generation(request, self.wav2vec, self.codec, self.semantic.transformer, self.device)

    def _cascade(self, request: GenerationRequest, plan: GenerationPlan, bars: StageBars) -> TokenCascade:
        """Set the stages up."""
        conditions = self._conditions(request)
        given = extra_tokens(request.given, [stage.transformer for stage in self.stages.values()], plan.batch)
        unguided = [name for name, one in conditions.items() if one is None and not given[name]]
        settings = _changed(self.sampling, dict.fromkeys(unguided, {"guidance_scale": 1.0}))
        settings = _changed(settings, request.sampling or {})
        first_seed = torch.randint(2**62, (plan.batch,)).tolist() if request.seeds is None else request.seeds
        seeds = [first_seed + i for i in range(plan.batch)] if isinstance(first_seed, int) else list(first_seed)

        def decoding(stage: StageWrapper, num_frames: Tensor, prompt: list[Tensor]) -> WindowedDecoding:
            name = stage.namespace
            found = WindowedDecoding(
                stage.transformer,
                num_frames,
                prompt=_prompt(stage, prompt),
                window_frames=stage.window_frames,
                batch_size=plan.batch,
                conditioning=conditions[name],
                settings=settings[name],
                seeds=[_stage_generator(seed, name) for seed in seeds],
                callback=_reporter(name, request, bars),
                allow_eos=name == "semantic" and self._may_end(request),
            )
            for stream, tokens in given[name].items():
                found.feed(stream, tokens)
            return found

        semantic = StageRun(decoding(self.semantic, plan.num_semantic, plan.semantic))
        runs = [StageRun(decoding(self.coarse, plan.num_frames, plan.acoustic), semantic, "semantic", plan.frames_for)]
        if self.fine is not None and not request.coarse_only:
            runs.append(StageRun(decoding(self.fine, plan.num_frames, plan.acoustic), runs[0], "coarse", torch.clone))
        return TokenCascade(semantic, runs)

    def _may_end(self, request: GenerationRequest) -> bool:
        """Whether semantic tokens may end by themselves."""
        knows_ends = self.semantic.transformer.layout.predicted[0].eos
        if request.allow_eos and not knows_ends:
            raise ValueError("allow_eos needs a semantic stage that has learned ends: train one with eos=True")
        if request.allow_eos is None:
            return knows_ends and request.seconds is None and request.semantic_tokens is None
        return request.allow_eos

    def _conditions(self, request: GenerationRequest) -> dict[str, Conditions | None]:
        """Condition of every stage: a finished one, or one made in its own namespace; None = unconditional."""
        finished = request.conditioning or {}
        unknown = set(finished) - set(self.stages)
        if unknown:
            raise ValueError(f"conditioning is by stage, of {list(self.stages)}; got {sorted(unknown)}")
        everything = {"text": request.text, "wavs": request.wavs, "codes": request.codes}
        heard: dict[str, dict[str, Any]] = {}
        for name, stage in self.stages.items():
            if stage.transformer.cond_dim is not None:
                heard[name] = everything
            elif stage.transformer.text_dim is not None and request.text is not None:
                heard[name] = {"text": request.text}
        # Where no stage hears what is said, each may say so itself.
        heard = heard or dict.fromkeys(self.stages, everything)
        made = {name: self.stages[name].condition(**said) for name, said in heard.items() if name not in finished}
        return {**dict.fromkeys(self.stages), **made, **finished}


def _chunks(
    cascade: TokenCascade, waves: WaveStreams, bars: StageBars, step_frames: int, sample_hz: int
) -> Iterator[GeneratedAudio]:
    """Let the stages work step by step, and give out what sounds."""
    silent: list[GeneratedAudio] = []
    is_done = False
    try:
        while not is_done:
            with torch.inference_mode():
                going_on = cascade.known_frames[~cascade.are_done]
                cascade.advance(step_frames + int(going_on.min()) if len(going_on) else 0)
                semantic, acoustic = cascade.take()
                is_done = bool(cascade.are_done.all())
                sound = waves.push(acoustic, cascade.are_done.tolist())
                silent.append(GeneratedAudio.of_items(sound, sample_hz, semantic, acoustic))
            if is_done or any(wave.numel() for wave in sound):
                yield GeneratedAudio.joined(silent)
                silent = []
    finally:
        bars.close()


def _prompt(stage: StageWrapper, acoustic: list[Tensor]) -> list[Tensor]:
    """The levels that a stage predicts."""
    source = stage.transformer.sources[stage.transformer.layout.predicted[0].name]
    return [tokens[:, source.first_level : source.first_level + source.num_levels] for tokens in acoustic]


def _reporter(stage: str, request: GenerationRequest, bars: StageBars) -> Callable[[int, int], None] | None:
    """What a stage tells its frames known and wanted; None where nobody listens."""
    listeners: list[Callable[[str, int, int], None]] = [bars] if request.progress else []
    if request.callback is not None:
        listeners.append(request.callback)

    def report(known: int, wanted: int) -> None:
        for listener in listeners:
            listener(stage, known, wanted)

    return report if listeners else None


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
