"""AudioLM (arXiv:2209.03143, section III): semantic tokens, then acoustic tokens, which a codec decodes to waves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import check_durations, samples_covering
from audiolm_pytorch.checks.tracing import not_compiled
from audiolm_pytorch.checks.types import named, typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, Conditions, ConditionTensor, TextEncoder
from audiolm_pytorch.generation.inputs import (
    GenerationLengths,
    change_frames,
    extra_input_tokens,
    plan_lengths,
    request_conditions,
)
from audiolm_pytorch.generation.request import (
    ConditionChange,
    GeneratedAudio,
    GenerationRequest,
    ProgressBars,
    Prompt,
    WaveStreams,
    decode_items,
)
from audiolm_pytorch.generation.sampling import (
    DEFAULT_SAMPLING,
    SamplingSettings,
    item_seeds,
    stage_generator,
    update_sampling,
)
from audiolm_pytorch.generation.windows import MARGIN_DIVISOR, SlidingWindowDecoder, StagePipeline
from audiolm_pytorch.lm.compatibility import check_compatible, check_loadable, check_stages_compatible
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.model_folder import read_model_folder, write_model_folder
from audiolm_pytorch.saving.sharing import SharedModel
from audiolm_pytorch.saving.text import joined_lines
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.token_batch import TokenBatch

__all__ = ["AudioLM", "GeneratedAudio"]

# Files of a model folder: the card, and one folder for each part, which has the name of the constructor argument.
_CARD = "audiolm.json"
_PARTS: dict[str, Any] = {
    "wav2vec": SemanticTokenizer,
    "codec": Codec,
    "semantic_transformer": SemanticTransformer,
    "coarse_transformer": CoarseTransformer,
    "fine_transformer": FineTransformer,
    "audio_conditioner": Conditioner,
    "text_conditioner": TextEncoder,
}
# Parts whose fingerprints the stages store, with their submodules that may be rounded.
_FINGERPRINTED: dict[str, tuple[str, ...]] = {
    **{"wav2vec": (), "codec": (), "text_conditioner": ()},
    "audio_conditioner": ("tables",),
}


class AudioLM(SharedModel):
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

    main_file = _CARD
    pipeline_tag = "text-to-audio"

    @typed
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
        self.semantic_transformer = semantic_transformer
        self.coarse_transformer = coarse_transformer
        self.fine_transformer = fine_transformer
        self.audio_conditioner = audio_conditioner
        self.text_conditioner = text_conditioner
        for stage in self.stages.values():
            check_compatible(stage, wav2vec, codec, audio_conditioner, text_conditioner)
        check_stages_compatible(*self.stages.values())
        self.sampling = update_sampling(DEFAULT_SAMPLING, sampling or {})

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        modules = self.wav2vec, self.codec, self.audio_conditioner, self.text_conditioner
        check_loadable(self.stages.values(), *modules)
        parts = {name: getattr(self, name) for name in _PARTS if getattr(self, name) is not None}
        sampling = {name: asdict(settings) for name, settings in self.sampling.items()}
        write_model_folder(folder, _CARD, parts, {"sampling": sampling}, dtype, _FINGERPRINTED)

    @classmethod
    @preserve_rng()
    def _read(cls, folder: Path, source: str | Path, hub: Mapping[str, Any]) -> "AudioLM":
        card, parts = read_model_folder(folder / _CARD, _PARTS)
        try:
            return cls(**parts, sampling=card.get("sampling"))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the modules in {folder} are not compatible: {joined_lines(error)}") from error

    @property
    def stages(self) -> Mapping[str, StageTransformer]:
        """The stages by name, in the order of the pipeline. To replace one, set e.g. `semantic_transformer`."""
        stages = (self.semantic_transformer, self.coarse_transformer, self.fine_transformer)
        return MappingProxyType({stage.namespace: stage for stage in stages if stage is not None})

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.semantic_transformer.device

    @named
    def forward(
        self,
        *,
        batch_size: int = 1,
        seconds: float | None = None,
        text: str | Sequence[str] | None = None,
        wavs: Tensor | None = None,
        codes: Tensor | None = None,
        conditions: Mapping[str, Tensor | ConditionTensor] | None = None,
        conditioning: Mapping[str, Conditions] | None = None,
        condition_changes: Sequence[ConditionChange] = (),
        negative_conditioning: Mapping[str, Conditions] | None = None,
        input_streams: AudioTokens | None = None,
        prime_wave: Prompt | Sequence[Prompt] | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_lengths: Tensor | None = None,
        semantic_tokens: Tensor | None = None,
        semantic_lengths: Tensor | None = None,
        coarse_only: bool = False,
        allow_eos: bool | None = None,
        seeds: int | Sequence[int] | None = None,
        sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None,
        callback: Callable[[str, int, int], None] | None = None,
        progress: bool = False,
    ) -> Tensor | list[Tensor]:
        """Generate waves at the sample rate of the codec. `GenerationRequest` documents the arguments.

        Returns:
            Waves `[b, n]`, or `[b, c, n]` for a codec of several channels; a list of waves if their lengths differ.
        """
        arguments = locals()
        request = GenerationRequest(**{field.name: arguments[field.name] for field in fields(GenerationRequest)})
        audio = self.generate(request)
        return audio.wave if audio.have_one_length else audio.waves

    @not_compiled
    @typed
    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> GeneratedAudio:
        """Generate audio and its tokens for all items in one batch.

        Inputs that are not valid for the model, and a prompt longer than the requested seconds, raise a ValueError.
        """
        bars, lengths = ProgressBars(), self._lengths(request)
        try:
            pipeline = self._pipeline(request, lengths, bars)
            pipeline.finish()
            semantic, acoustic = pipeline.take()
        finally:
            bars.close()
        longest = (acoustic.lengths * self.codec.downsample_factor).tolist()
        waves = decode_items(self.codec, acoustic, [min(pair) for pair in zip(lengths.num_samples, longest)])
        return GeneratedAudio.of_tokens(waves, self.codec.target_sample_hz, semantic, acoustic)

    @typed
    def stream(self, request: GenerationRequest, *, chunk_seconds: float = 1.0) -> Iterator[GeneratedAudio]:
        """Generate audio in chunks. The stages decode only the tokens that the next chunk needs.

        Args:
            request: What to generate.
            chunk_seconds: Minimum duration of a chunk. A chunk can be longer where a window ends, or because the codec
                must wait for later frames; the last chunk can be shorter.

        Returns:
            An iterator of chunks. `GeneratedAudio.concatenate` of all chunks equals the result of `generate`. A chunk
            can contain semantic tokens of later audio, because the coarse stage needs all semantic tokens of its
            window. A codec without `decoder_stream` raises a ValueError.
        """
        codec = self.codec
        check_durations(chunk_seconds=chunk_seconds)
        factor = codec.downsample_factor
        chunk_frames = max(1, samples_covering(chunk_seconds, factor, codec.target_sample_hz) // factor)
        with torch.no_grad():
            bars, lengths = ProgressBars(), self._lengths(request)
            pipeline, waves = self._pipeline(request, lengths, bars), WaveStreams(codec, lengths.num_samples)
        return _chunks(pipeline, waves, bars, chunk_frames, codec.target_sample_hz)

    def _lengths(self, request: GenerationRequest) -> GenerationLengths:
        return plan_lengths(request, self.wav2vec, self.codec, self.semantic_transformer, self.device)

    def _pipeline(self, request: GenerationRequest, lengths: GenerationLengths, bars: ProgressBars) -> StagePipeline:
        """Build the pipeline of all stages for a request."""
        conditions = request_conditions(request, self.stages, self.audio_conditioner, self.text_conditioner)
        batch = len(lengths.num_samples)
        inputs = extra_input_tokens(request.input_streams, list(self.stages.values()), batch)
        unguided = [
            name for name, stage in self.stages.items() if not _can_be_guided(stage, conditions[name], inputs[name])
        ]
        settings = update_sampling(self.sampling, dict.fromkeys(unguided, {"guidance_scale": 1.0}))
        settings = update_sampling(settings, request.sampling or {})
        negative = request.negative_conditioning or {}
        if negative and all(settings[name].guidance_scale == 1 for name in negative.keys() & self.stages.keys()):
            raise ValueError(
                "negative conditions need guidance, but its scale is 1 in all stages; pass for example "
                'sampling={"semantic": {"guidance_scale": 3.0}}, or --guidance-scale 3'
            )
        changes = change_frames(request, self.wav2vec, self.codec)
        seeds = item_seeds(request.seeds, batch)

        def decoder_of(stage: StageTransformer, source: SlidingWindowDecoder | None) -> SlidingWindowDecoder:
            name = stage.namespace
            prompt, num_frames, kind = lengths.semantic, lengths.num_semantic, 0
            if source is not None:
                prompt, num_frames, kind = _predicted_levels(stage, lengths.acoustic), lengths.num_frames, 1
            later = [change.conditioning.get(name, {}) for change in request.condition_changes]
            return SlidingWindowDecoder(
                stage,
                num_frames,
                inputs=inputs[name],
                sources={} if source is None else {source.name: source},
                prompt=prompt,
                window_frames=stage.window_frames,
                margin_frames=(stage.window_frames or 0) // MARGIN_DIVISOR,
                batch_size=batch,
                conditioning=conditions[name],
                changes=[(frames[kind], part) for frames, part in zip(changes, later)],
                negative=negative.get(name),
                settings=settings[name],
                seeds=[stage_generator(seed, name) for seed in seeds],
                callback=_callback_of(name, request, bars),
                allow_eos=name == "semantic" and self._allows_eos(request),
            )

        semantic = decoder_of(self.semantic_transformer, None)
        acoustic = [decoder_of(self.coarse_transformer, semantic)]
        if self.fine_transformer is not None and not request.coarse_only:
            acoustic.append(decoder_of(self.fine_transformer, acoustic[0]))
        return StagePipeline(semantic, acoustic)

    def _allows_eos(self, request: GenerationRequest) -> bool:
        """Whether the semantic stage may sample the end token."""
        has_eos = self.semantic_transformer.layout.predicted[0].eos
        if request.allow_eos and not has_eos:
            raise ValueError("got allow_eos=True, but the semantic stage has no end token; train it with eos=True")
        if request.allow_eos is None:
            return has_eos and request.seconds is None and request.semantic_tokens is None
        return request.allow_eos


def _chunks(
    pipeline: StagePipeline, waves: WaveStreams, bars: ProgressBars, chunk_frames: int, sample_hz: int
) -> Iterator[GeneratedAudio]:
    """Advance the pipeline by `chunk_frames` frames at a time, and yield every chunk that contains audio."""
    pending: list[GeneratedAudio] = []  # tokens that the codec has not turned into audio yet
    is_done = False
    try:
        while not is_done:
            with torch.no_grad():
                unfinished_frames = pipeline.last.known_frames[~pipeline.last.are_done]
                pipeline.last.advance(chunk_frames + int(unfinished_frames.min()) if len(unfinished_frames) else 0)
                semantic, acoustic = pipeline.take()
                are_done = pipeline.last.are_done
                is_done = bool(are_done.all())
                new_waves = waves.push(acoustic, are_done.tolist())
                pending.append(GeneratedAudio.of_tokens(new_waves, sample_hz, semantic, acoustic))
            if is_done or any(wave.numel() for wave in new_waves):
                yield GeneratedAudio.concatenate(pending)
                pending = []
    finally:
        bars.close()


def _can_be_guided(stage: StageTransformer, conditions: Conditions, inputs: Mapping[str, TokenBatch]) -> bool:
    """Whether a stage has inputs that guidance can drop (conditions, or input streams that are conditions)."""
    droppable = [stream for stream in stage.layout.inputs if stream.is_condition]
    return bool(conditions) or any(stream.is_in_time or stream.name in inputs for stream in droppable)


def _predicted_levels(stage: StageTransformer, acoustic: TokenBatch) -> TokenBatch:
    """Select the acoustic levels that a stage predicts."""
    source = stage.sources[stage.layout.predicted[0].name]
    return TokenBatch(acoustic.ids[..., source.first_level : source.first_level + source.num_levels], acoustic.lengths)


def _callback_of(stage: str, request: GenerationRequest, bars: ProgressBars) -> Callable[[int, int], None] | None:
    """Build the callback of one stage from the callback of the request."""
    callbacks: list[Callable[[str, int, int], None]] = [bars] if request.progress else []
    if request.callback is not None:
        callbacks.append(request.callback)

    def report(known_frames: int, requested_frames: int) -> None:
        for callback in callbacks:
            callback(stage, known_frames, requested_frames)

    return report if callbacks else None
