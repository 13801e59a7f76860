"""AudioLM (arXiv:2209.03143, sec. III): semantic, coarse and fine tokens, one after another, to the codec's decoder."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio.units import samples_covering
from audiolm_pytorch.codecs.base import Codec, StreamingCodec
from audiolm_pytorch.conditioning.tensors import Conditioner, Conditions, TextEncoder
from audiolm_pytorch.generation.lengths import GenerationLengths, extra_tokens, plan_lengths
from audiolm_pytorch.generation.request import GeneratedAudio, GenerationRequest, StageBars, takes_request
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.stage_pipeline import PipelineStep, StagePipeline
from audiolm_pytorch.generation.stage_sampling import DEFAULT_SAMPLING, changed_sampling, stage_generator
from audiolm_pytorch.generation.waves import WaveStreams, decode_items
from audiolm_pytorch.generation.windows import SlidingWindowDecoder
from audiolm_pytorch.generation.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
    StageWrapper,
)
from audiolm_pytorch.lm.compatibility import check_stages_compatible
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.nn.half_weights import with_half_weights
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["AudioLM", "GeneratedAudio"]


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
        conditioners = audio_conditioner, text_conditioner
        self.semantic = SemanticTransformerWrapper(semantic_transformer, wav2vec, *conditioners)
        self.coarse = CoarseTransformerWrapper(coarse_transformer, codec, wav2vec, *conditioners)
        self.fine = None if fine_transformer is None else FineTransformerWrapper(fine_transformer, codec, *conditioners)
        check_stages_compatible(*(stage.transformer for stage in self.stages.values()))
        self.sampling = changed_sampling(DEFAULT_SAMPLING, sampling or {})

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

    @takes_request
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

    @takes_request
    @torch.no_grad()
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

    @takes_request
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
        # A frame at the least, or nothing would ever come: what rounds to no sample is covered by none.
        factor = codec.downsample_factor
        step = max(1, samples_covering(chunk_seconds, factor, codec.target_sample_hz) // factor)
        with torch.no_grad():
            wish, bars = GenerationRequest(**request), StageBars()
            plan = self._plan(wish)
            cascade, waves = self._cascade(wish, plan, bars), WaveStreams(codec, plan.num_samples)
        return _chunks(cascade, waves, bars, step, codec.target_sample_hz)

    # a request as stages at work

    def _plan(self, request: GenerationRequest) -> GenerationLengths:
        return plan_lengths(request, self.wav2vec, self.codec, self.semantic.transformer, self.device)

    def _cascade(self, request: GenerationRequest, plan: GenerationLengths, bars: StageBars) -> StagePipeline:
        """Set the stages up."""
        conditions = self._conditions(request)
        given = extra_tokens(request.input_streams, [stage.transformer for stage in self.stages.values()], plan.batch)
        unguided = [name for name, stage in self.stages.items() if not _is_led(stage, conditions[name], given[name])]
        settings = changed_sampling(self.sampling, dict.fromkeys(unguided, {"guidance_scale": 1.0}))
        settings = changed_sampling(settings, request.sampling or {})
        first_seed = torch.randint(2**62, (plan.batch,)).tolist() if request.seeds is None else request.seeds
        seeds = [first_seed + i for i in range(plan.batch)] if isinstance(first_seed, int) else list(first_seed)

        def decoding(stage: StageWrapper, num_frames: Tensor, prompt: list[Tensor]) -> SlidingWindowDecoder:
            name = stage.namespace
            found = SlidingWindowDecoder(
                stage.transformer,
                num_frames,
                prompt=_prompt(stage, prompt),
                window_frames=stage.window_frames,
                batch_size=plan.batch,
                conditioning=conditions[name],
                settings=settings[name],
                seeds=[stage_generator(seed, name) for seed in seeds],
                callback=_reporter(name, request, bars),
                allow_eos=name == "semantic" and self._may_end(request),
            )
            for stream, tokens in given[name].items():
                found.feed(stream, tokens)
            return found

        semantic = PipelineStep(decoding(self.semantic, plan.num_semantic, plan.semantic))
        runs = [
            PipelineStep(decoding(self.coarse, plan.num_frames, plan.acoustic), semantic, "semantic", plan.frames_for)
        ]
        if self.fine is not None and not request.coarse_only:
            runs.append(
                PipelineStep(decoding(self.fine, plan.num_frames, plan.acoustic), runs[0], "coarse", torch.clone)
            )
        return StagePipeline(semantic, runs)

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
        readers = [stage for name, stage in self.stages.items() if stage.transformer.text_dim and name not in finished]
        states = None
        if request.text is not None and self.text_conditioner is not None and readers:
            states = self.text_conditioner.forward(request.text)  # once, as they are the same for all stages
        everything = {"text": request.text, "wavs": request.wavs, "codes": request.codes, "states": states}
        conditioner_inputs: dict[str, dict[str, Any]] = {}
        for name, stage in self.stages.items():
            if stage.transformer.cond_dim is not None:
                conditioner_inputs[name] = everything
            elif stage.transformer.text_dim is not None and request.text is not None:
                conditioner_inputs[name] = {"text": request.text, "states": states}
        takes_codes = any(stage.transformer.cond_dim is not None for stage in self.stages.values())
        if not conditioner_inputs or not (takes_codes or request.wavs is None and request.codes is None):
            # What no stage hears must not go unheard in silence: each says so itself.
            conditioner_inputs = dict.fromkeys(self.stages, everything)
        made = {
            name: self.stages[name].condition(**inputs)
            for name, inputs in conditioner_inputs.items()
            if name not in finished
        }
        return {**dict.fromkeys(self.stages), **made, **finished}


def _chunks(
    cascade: StagePipeline, waves: WaveStreams, bars: StageBars, step_frames: int, sample_hz: int
) -> Iterator[GeneratedAudio]:
    """Let the stages work step by step, and give out what sounds."""
    silent: list[GeneratedAudio] = []
    is_done = False
    try:
        while not is_done:
            with torch.no_grad():
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


def _is_led(stage: StageWrapper, conditions: Conditions | None, given: Mapping[str, list[Tensor]]) -> bool:
    """Whether a stage has anything that guidance can lead it away from: streams in time are never taken away."""
    streams = [one for one in stage.transformer.layout.inputs if not one.is_in_time]
    return conditions is not None or any(one.name in given for one in streams)


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
