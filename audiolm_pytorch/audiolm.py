"""AudioLM (arXiv:2209.03143, sec. III): generates semantic tokens, then acoustic tokens, and decodes them to waves."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio.units import samples_covering
from audiolm_pytorch.codecs.base import Codec, StreamingCodec
from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.generation.lengths import GenerationLengths, extra_input_tokens, plan_lengths
from audiolm_pytorch.generation.request import GeneratedAudio, GenerationRequest, ProgressBars, with_request_signature
from audiolm_pytorch.generation.sampling import DEFAULT_SAMPLING, SamplingSettings, stage_generator, update_sampling
from audiolm_pytorch.generation.stage_pipeline import PipelineStep, StagePipeline
from audiolm_pytorch.generation.waves import WaveStreams, decode_items
from audiolm_pytorch.generation.windows import SlidingWindowDecoder
from audiolm_pytorch.generation.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
    StageWrapper,
)
from audiolm_pytorch.lm.compatibility import check_stages_compatible
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.nn.half_weights import with_half_weights
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["AudioLM", "GeneratedAudio"]


class AudioLM(nn.Module):
    """Generates semantic tokens, then coarse and fine acoustic tokens, and decodes them to waves with a codec.

    Args:
        wav2vec: The semantic tokenizer that the stages were trained with.
        codec: The codec that the stages were trained with.
        semantic_transformer: Stage that predicts semantic tokens.
        coarse_transformer: Stage that predicts the coarse acoustic levels from semantic tokens.
        fine_transformer: Stage that predicts the remaining acoustic levels; None = the coarse stage predicts all
            levels.
        audio_conditioner: Computes codes of texts or waves; needed by stages with `audio_text_condition`.
        text_conditioner: Computes states of texts; needed by stages with `text_dim`.
        sampling: Sampling settings by stage name, or a dict of the fields that differ from `DEFAULT_SAMPLING`.

    Raises:
        ValueError: If stages, tokenizers and conditioners are not compatible.
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
        conditioners: dict[str, Any] = {"audio_conditioner": audio_conditioner, "text_conditioner": text_conditioner}
        self.semantic = SemanticTransformerWrapper(semantic_transformer, wav2vec=wav2vec, **conditioners)
        self.coarse = CoarseTransformerWrapper(coarse_transformer, codec=codec, wav2vec=wav2vec, **conditioners)
        self.fine: FineTransformerWrapper | None = None
        if fine_transformer is not None:
            self.fine = FineTransformerWrapper(fine_transformer, codec=codec, **conditioners)
        check_stages_compatible(*(stage.transformer for stage in self.stages.values()))
        self.sampling = update_sampling(DEFAULT_SAMPLING, sampling or {})

    @property
    def stages(self) -> dict[str, StageWrapper]:
        """The stages by name, in the order of the pipeline."""
        stages: tuple[StageWrapper | None, ...] = (self.semantic, self.coarse, self.fine)
        return {stage.namespace: stage for stage in stages if stage is not None}

    @property
    def semantic_transformer(self) -> StageTransformer:
        """The stage that predicts semantic tokens."""
        return self.semantic.transformer

    @property
    def coarse_transformer(self) -> StageTransformer:
        """The stage that predicts coarse acoustic levels."""
        return self.coarse.transformer

    @property
    def fine_transformer(self) -> StageTransformer | None:
        """The stage that predicts fine acoustic levels; None if the model has no fine stage."""
        return None if self.fine is None else self.fine.transformer

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.semantic_transformer.device

    def with_half_weights(self) -> "AudioLM":
        """Return a copy for generation whose stages have bfloat16 weights; all other parts are shared."""
        stages: dict[str, Any] = {
            f"{name}_transformer": with_half_weights(stage.transformer) for name, stage in self.stages.items()
        }
        return AudioLM(
            wav2vec=self.wav2vec,
            codec=self.codec,
            audio_conditioner=self.audio_conditioner,
            text_conditioner=self.text_conditioner,
            sampling=self.sampling,
            **stages,
        )

    @with_request_signature
    def forward(self, **request: Any) -> Tensor | list[Tensor]:
        """Generate waves at the sample rate of the codec.

        Args:
            **request: See `GenerationRequest`.

        Returns:
            Waves `[b, n]`, or `[b, c, n]` for a codec of several channels; a list of waves if their lengths differ.
        """
        audio = self.generate(**request)
        return audio.wave if audio.have_one_length else audio.waves

    @with_request_signature
    @torch.no_grad()
    def generate(self, **request: Any) -> GeneratedAudio:
        """Generate audio and its tokens for all items in one batch.

        Args:
            **request: See `GenerationRequest`.

        Raises:
            ValueError: If inputs are not valid for the model, or a prompt is longer than the requested seconds.
        """
        checked, bars = GenerationRequest(**request), ProgressBars()
        lengths = self._lengths(checked)
        try:
            pipeline = self._pipeline(checked, lengths, bars)
            pipeline.finish()
            semantic, acoustic = pipeline.take()
        finally:
            bars.close()
        num_samples = [
            min(requested, len(tokens) * self.codec.downsample_factor)
            for requested, tokens in zip(lengths.num_samples, acoustic)
        ]
        waves = decode_items(self.codec, acoustic, num_samples)
        return GeneratedAudio.of_items(waves, self.codec.target_sample_hz, semantic, acoustic)

    @with_request_signature
    def stream(self, *, chunk_seconds: float | int = 1.0, **request: Any) -> Iterator[GeneratedAudio]:
        """Generate audio in chunks. The stages decode only the tokens that the next chunk needs.

        Args:
            chunk_seconds: Minimum duration of a chunk. A chunk can be longer at the end of a window or if the codec
                needs later frames; the last chunk can be shorter.
            **request: See `GenerationRequest`.

        Returns:
            An iterator of chunks. `GeneratedAudio.concatenate` of all chunks equals the result of `generate`. A chunk
            can contain semantic tokens of later audio, because the coarse stage needs all semantic tokens of its
            window.

        Raises:
            ValueError: If the codec has no `decoder_stream`, or for the reasons listed in `generate`.
        """
        codec = self.codec
        if not isinstance(codec, StreamingCodec):
            raise ValueError(
                f"{type(codec).__name__} has no decoder_stream; call generate, or use a codec with a decoder_stream, "
                "such as SoundStream"
            )
        if not 0 < chunk_seconds < float("inf"):
            raise ValueError(f"chunk_seconds must be positive and finite, got {chunk_seconds}")
        factor = codec.downsample_factor
        chunk_frames = max(1, samples_covering(chunk_seconds, factor, codec.target_sample_hz) // factor)
        with torch.no_grad():
            checked, bars = GenerationRequest(**request), ProgressBars()
            lengths = self._lengths(checked)
            pipeline, waves = self._pipeline(checked, lengths, bars), WaveStreams(codec, lengths.num_samples)
        return _chunks(pipeline, waves, bars, chunk_frames, codec.target_sample_hz)

    def _lengths(self, request: GenerationRequest) -> GenerationLengths:
        return plan_lengths(request, self.wav2vec, self.codec, self.semantic_transformer, self.device)

    def _pipeline(self, request: GenerationRequest, lengths: GenerationLengths, bars: ProgressBars) -> StagePipeline:
        """Build the pipeline of all stages for a request."""
        conditions = self._conditions(request)
        transformers = [stage.transformer for stage in self.stages.values()]
        inputs = extra_input_tokens(request.input_streams, transformers, lengths.batch)
        unguided = [
            name for name, stage in self.stages.items() if not _can_be_guided(stage, conditions[name], inputs[name])
        ]
        settings = update_sampling(self.sampling, dict.fromkeys(unguided, {"guidance_scale": 1.0}))
        settings = update_sampling(settings, request.sampling or {})
        first_seed = torch.randint(2**62, (lengths.batch,)).tolist() if request.seeds is None else request.seeds
        seeds = [first_seed + i for i in range(lengths.batch)] if isinstance(first_seed, int) else list(first_seed)

        def decoder_of(stage: StageWrapper, num_frames: Tensor, prompt: list[Tensor]) -> SlidingWindowDecoder:
            name = stage.namespace
            decoder = SlidingWindowDecoder(
                stage.transformer,
                num_frames,
                prompt=_predicted_levels(stage, prompt),
                window_frames=stage.window_frames,
                batch_size=lengths.batch,
                conditioning=conditions[name],
                settings=settings[name],
                seeds=[stage_generator(seed, name) for seed in seeds],
                callback=_callback_of(name, request, bars),
                allow_eos=name == "semantic" and self._allows_eos(request),
            )
            for stream, tokens in inputs[name].items():
                decoder.feed(stream, tokens)
            return decoder

        semantic = PipelineStep(decoder_of(self.semantic, lengths.num_semantic, lengths.semantic))
        coarse_decoder = decoder_of(self.coarse, lengths.num_frames, lengths.acoustic)
        acoustic = [PipelineStep(coarse_decoder, semantic, "semantic", lengths.frames_for)]
        if self.fine is not None and not request.coarse_only:
            fine_decoder = decoder_of(self.fine, lengths.num_frames, lengths.acoustic)
            acoustic.append(PipelineStep(fine_decoder, acoustic[0], "coarse"))
        return StagePipeline(semantic, acoustic)

    def _allows_eos(self, request: GenerationRequest) -> bool:
        """Whether the semantic stage may sample the end token."""
        has_eos = self.semantic_transformer.layout.predicted[0].eos
        if request.allow_eos and not has_eos:
            raise ValueError("got allow_eos=True, the semantic stage was trained without ends; train it with eos=True")
        if request.allow_eos is None:
            return has_eos and request.seconds is None and request.semantic_tokens is None
        return request.allow_eos

    def _conditions(self, request: GenerationRequest) -> dict[str, Conditions]:
        """Conditions by stage name, from the request or computed from its inputs."""
        finished, stages = request.conditioning or {}, self.stages
        unknown = set(finished) - set(stages)
        if unknown:
            raise ValueError(f"got conditioning for unknown stages {sorted(unknown)}; the stages are {list(stages)}")
        states = None
        needs_states = any(stage.transformer.text_dim and name not in finished for name, stage in stages.items())
        if request.text is not None and self.text_conditioner is not None and needs_states:
            states = self.text_conditioner.forward(request.text)  # once, because all stages use the same states
        inputs: dict[str, Any] = {"text": request.text, "wavs": request.wavs, "codes": request.codes, "states": states}
        further = {name: ConditionTensor.of(value) for name, value in (request.conditions or {}).items()}
        accepted = {name for stage in stages.values() for name in stage.transformer.fuser.specs}
        if not further.keys() <= accepted:
            raise ValueError(f"got the conditions {sorted(further)}, the stages accept {sorted(accepted)}")
        if "codes" not in accepted and (
            "text" not in accepted or request.wavs is not None or request.codes is not None
        ):
            self.semantic.condition(**inputs)  # raises an error if there are inputs, because no stage uses them
        conditions: dict[str, Conditions] = {}
        for name, stage in stages.items():
            names = stage.transformer.fuser.specs.keys()
            of_stage: Conditions | None = None
            if name in finished:
                of_stage = finished[name]
            elif "codes" in names:
                of_stage = stage.condition(**inputs)
            elif "text" in names:
                of_stage = stage.condition(text=request.text, states=states)
            conditions[name] = {key: further[key] for key in names & further.keys()} | dict(of_stage or {})
        return conditions


def _chunks(
    pipeline: StagePipeline, waves: WaveStreams, bars: ProgressBars, chunk_frames: int, sample_hz: int
) -> Iterator[GeneratedAudio]:
    """Advance the pipeline by `chunk_frames` frames at a time, and yield every chunk that contains audio."""
    pending: list[GeneratedAudio] = []  # tokens that the codec has not turned into audio yet
    is_done = False
    try:
        while not is_done:
            with torch.no_grad():
                unfinished_frames = pipeline.known_frames[~pipeline.are_done]
                pipeline.advance(chunk_frames + int(unfinished_frames.min()) if len(unfinished_frames) else 0)
                semantic, acoustic = pipeline.take()
                is_done = bool(pipeline.are_done.all())
                new_waves = waves.push(acoustic, pipeline.are_done.tolist())
                pending.append(GeneratedAudio.of_items(new_waves, sample_hz, semantic, acoustic))
            if is_done or any(wave.numel() for wave in new_waves):
                yield GeneratedAudio.concatenate(pending)
                pending = []
    finally:
        bars.close()


def _can_be_guided(stage: StageWrapper, conditions: Conditions, inputs: Mapping[str, list[Tensor]]) -> bool:
    """Whether guidance changes the logits of a stage; guidance drops conditions and input streams without a rate."""
    droppable = [stream for stream in stage.transformer.layout.inputs if not stream.is_in_time]
    return bool(conditions) or any(stream.name in inputs for stream in droppable)


def _predicted_levels(stage: StageWrapper, tokens: list[Tensor]) -> list[Tensor]:
    """Select the acoustic levels that a stage predicts from tokens `[f_i, q]`."""
    source = stage.transformer.sources[stage.transformer.layout.predicted[0].name]
    return [of_item[:, source.first_level : source.first_level + source.num_levels] for of_item in tokens]


def _callback_of(stage: str, request: GenerationRequest, bars: ProgressBars) -> Callable[[int, int], None] | None:
    """Build the callback of one stage from the callback of the request."""
    callbacks: list[Callable[[str, int, int], None]] = [bars] if request.progress else []
    if request.callback is not None:
        callbacks.append(request.callback)

    def report(known_frames: int, requested_frames: int) -> None:
        for callback in callbacks:
            callback(stage, known_frames, requested_frames)

    return report if callbacks else None
