"""MusicGen and AudioGen: music and sounds from texts, melodies and audio prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from audiolm_pytorch.audio.units import check_durations, frames_inside, samples_covering
from audiolm_pytorch.checks.types import keep_arguments, typed, usable_device
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor, TextEncoder
from audiolm_pytorch.generation.prompts import acoustic_tokens
from audiolm_pytorch.generation.request import ProgressBars, WaveStreams, decode_items
from audiolm_pytorch.generation.sampling import stage_generator
from audiolm_pytorch.generation.windows import SlidingWindowDecoder
from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.nn.module_state import check_positive, eval_mode
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.sharing import SharedModel, card_text, write_card
from audiolm_pytorch.tokens.token_batch import TokenBatch
from musiclm_pytorch.mulan.text_tower import report_unknown_words
from musiclm_pytorch.musicgen.audiocraft_format import write_audiocraft
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.inputs import AudioInput, MusicRequest, TextInput
from musiclm_pytorch.musicgen.melody import Melody, MelodyInput, Stems
from musiclm_pytorch.musicgen.parts import MusicGenParts
from musiclm_pytorch.musicgen.published import CARD, load_musicgen_parts, read_own_parts, write_own_parts
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.musicgen.transformers_format import write_transformers

__all__ = ["AudioGen", "GeneratedMusic", "MusicGen"]

Model = TypeVar("Model", bound="MusicGen")

# Chroma frames of 30 s: 32,000 Hz in steps of 4096 samples.
_FRAMES_OF_30_SECONDS = 235


@dataclass(frozen=True, eq=False)
class GeneratedMusic:
    """Generated waves and their tokens.

    Attributes:
        waves: One float wave `[n_i]` per item, or `[c, n_i]` if the codec has several channels; prompts included.
        tokens: Codes `[b, f, q]` int64; -1 past the length of an item.
        sample_hz: Sample rate of the waves in Hz.
    """

    waves: list[Tensor]
    tokens: Tensor
    sample_hz: int


class MusicGen(SharedModel):
    """Generates music with one language model over the tokens of a codec (arXiv:2306.05284).

    Args:
        codec: The codec that the language model was trained with.
        text_conditioner: The text encoder that the language model was trained with; None = no texts.
        transformer: The language model; None = a new language model with the following sizes.
        melody: Whether a new language model is conditioned on melodies; `sum` = by the way "sum" of its `melody_way`.
        dim: Width of a new language model.
        depth: Number of blocks of a new language model.
        heads: Number of attention heads of a new language model.
        num_codebooks: Number of codes per frame of a new language model, the first levels of the codec; None = all.
        max_seconds: Longest duration in the training of a new language model; longer music is generated in windows.
            None = the default of the class, 30 s for MusicGen.
        cond_drop_prob: Probability that training drops all conditions of an item; for a new language model.
        melody_drop_prob: Probability that training drops only the melody of an item; for a new language model.
        text_drop_prob: Probability that training drops only the text of an item; for a new model with a melody.
    """

    main_file = CARD
    pipeline_tag = "text-to-audio"
    default_seconds: ClassVar[float] = 15.0
    default_max_seconds: ClassVar[float] = 30.0
    # Distance of the starts of two windows, as a share of a window: 18 s of 30 s.
    stride_share: ClassVar[float] = 0.6

    @typed
    def __init__(
        self,
        *,
        codec: Codec,
        text_conditioner: TextEncoder | None = None,
        transformer: MusicGenTransformer | None = None,
        melody: bool | Literal["sum"] = False,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        num_codebooks: int | None = None,
        max_seconds: float | None = None,
        cond_drop_prob: float = 0.3,
        melody_drop_prob: float = 0.5,
        text_drop_prob: float = 0.1,
    ) -> None:
        super().__init__()
        if transformer is None:
            check_positive(dim=dim, depth=depth, heads=heads)
            check_durations(max_seconds=max_seconds)
            if dim % heads:
                raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
            seconds = self.default_max_seconds if max_seconds is None else max_seconds
            transformer = MusicGenTransformer(
                dim=dim,
                depth=depth,
                heads=heads,
                dim_head=dim // heads,
                codebook_size=codec.codebook_size,
                num_codebooks=codec.num_quantizers if num_codebooks is None else num_codebooks,
                num_groups=getattr(codec, "num_groups", 1),
                rate_hz=f"{codec.target_sample_hz}/{codec.downsample_factor}",
                text_dim=None if text_conditioner is None else text_conditioner.dim,
                melody_frames=max(1, round(_FRAMES_OF_30_SECONDS * seconds / 30)) if melody else None,
                melody_way="sum" if melody == "sum" else "prepend",
                max_seconds=seconds,
                cond_drop_prob=cond_drop_prob,
                melody_drop_prob=melody_drop_prob,
                text_drop_prob=text_drop_prob,
            )
        if (transformer.text_dim is None) != (text_conditioner is None):
            raise ValueError(
                "got only one of a text_conditioner and a transformer with a text_dim; pass both or neither"
            )
        check_compatible(transformer, codec=codec, text_conditioner=text_conditioner)
        self.codec, self.text_conditioner, self.transformer = codec, text_conditioner, transformer
        self.chroma = None if transformer.melody_frames is None else ChromaConditioner(transformer.melody_frames)
        keep_arguments(self, {"melody": self.chroma is not None, **transformer.config})
        self.train(False)

    @classmethod
    @typed
    @preserve_rng()
    def from_pretrained(
        cls: type[Model],
        source: str | Path,
        *,
        text_conditioner: TextEncoder | None = None,
        device: str | torch.device = "cpu",
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> Model:
        """Load a model in eval mode and float32; `SharedModel.from_pretrained` documents further arguments.

        Args:
            source: Folder, or id on the Hugging Face hub such as `facebook/musicgen-small`, of a model in the format
                of transformers, of audiocraft (`facebook/audiogen-medium`), or of this library. Files of audiocraft
                are read without running code.
            text_conditioner: Text encoder instead of that of the model. The files of audiocraft contain no text
                encoder; it is in the folder `text_encoder` beside the files, or loaded from the hub.
        """
        device = usable_device(device)
        hub = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
        parts = load_musicgen_parts(source, text_conditioner, {**hub, "allow_noncommercial": allow_noncommercial})
        return cls(**vars(parts)).to(device).eval()

    @typed
    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: Literal["own", "transformers", "audiocraft"] = "own",
        dtype: torch.dtype | None = None,
        licence: str | None = None,
    ) -> None:
        """Write the model to a folder, which `from_pretrained` loads.

        The format `own` accepts every codec and text encoder. `transformers` and `audiocraft` are the published
        formats, which need an EnCodec and a T5. `SharedModel.save_pretrained` documents `dtype` and `licence`.
        """
        if format == "own":
            super().save_pretrained(folder, dtype=dtype, licence=licence)
            return
        card = card_text(self, licence)
        write = write_transformers if format == "transformers" else write_audiocraft
        write(Path(folder), self._parts, dtype)
        write_card(Path(folder), card)

    @property
    def _parts(self) -> MusicGenParts:
        return MusicGenParts(self.transformer, self.codec, self.text_conditioner)

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        write_own_parts(folder, self._parts, dtype)

    @classmethod
    def _read(cls, folder: Path, source: str | Path, hub: Mapping[str, Any]) -> "MusicGen":
        return cls(**vars(read_own_parts(folder)))

    @property
    def sample_hz(self) -> int:
        """Sample rate of the music in Hz."""
        return self.codec.target_sample_hz

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.transformer.device

    @typed
    def forward(
        self,
        texts: TextInput | None = None,
        *,
        num_samples: int | None = None,
        seconds: float | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = 250,
        guidance_scale: float = 3.0,
    ) -> Tensor:
        """Generate waves `[b, n]`, or `[b, c, n]` for a codec of several channels.

        Item i has the seed `seed + i`. `generate` documents the other arguments, and accepts more inputs.
        """
        music = self.generate(
            texts=texts,
            num_samples=num_samples,
            seconds=seconds,
            seeds=seed,
            temperature=temperature,
            top_k=top_k,
            guidance_scale=guidance_scale,
        )
        return torch.stack(music.waves)

    @typed
    @torch.no_grad()
    def generate(
        self,
        *,
        texts: TextInput | None = None,
        num_samples: int | None = None,
        seconds: float | None = None,
        prompt: AudioInput | None = None,
        prompt_sample_hz: int | None = None,
        melody: MelodyInput | None = None,
        stems: Stems | None = None,
        melody_sample_hz: int | None = None,
        seeds: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = 250,
        top_p: float | None = None,
        guidance_scale: float = 3.0,
        stride_seconds: float | None = None,
        fade_out_seconds: float = 0.0,
        callback: Callable[[int, int], None] | None = None,
        progress: bool = False,
    ) -> GeneratedMusic:
        """Generate music. A result depends only on the seed and the inputs of its item, not on the batch.

        Args:
            texts: One text for all items, or a text per item. None and an empty text are no text. A list in place of a
                text has one text per window; the last text is used for all later windows.
            num_samples: Number of items; None = the number of items of the other inputs.
            seconds: Length of the music, prompt included, rounded up to whole frames; None = the length of the prompt
                plus 15 s (AudioGen: 5 s).
            prompt: Audio to continue: a file or a wave `[n]` for all items, waves `[b, n]` or `[b, c, n]`, or a list of
                files, waves `[n]` or `[c, n]`, and None. Only complete frames of a prompt are used. Codes of its last
                frames encode its end, if the codec has a look-ahead, as in the published implementations.
            prompt_sample_hz: Sample rate in Hz of prompts that are waves; None = the rate of the codec.
            melody: Music whose melody the result follows, in the forms of `prompt`. In place of a wave, an item may be
                chroma vectors `[f, 12]`, or a list of notes `(midi_pitch, start_seconds, end_seconds)`. An item without
                a melody is None.
            stems: Music as separated by any program, instead of `melody`: waves `[n]` or `[c, n]` or files by name, for
                one item, or per item. The melody is that of all stems except `drums` and `bass`.
            melody_sample_hz: Sample rate in Hz of melodies and stems that are waves; None = the rate of the codec.
            seeds: Seed of every item; an int n means n, n + 1, ...; None draws seeds from torch's generator.
            temperature: Divisor of the logits; 0 = the most likely token.
            top_k: Number of most likely tokens to sample from; None = all tokens.
            top_p: Total probability of the most likely tokens to sample from; None = all tokens.
            guidance_scale: Scale of classifier-free guidance; 1 = no guidance. Without texts and melodies, the scale is
                always 1.
            stride_seconds: Duration that each window adds, if the music is longer than a window; None = 0.6 of a window
                (AudioGen: 0.2).
            fade_out_seconds: Duration of the linear fade-out at the end.
            callback: Called as `callback(known_frames, requested_frames)`, with the frames of the longest item.
            progress: Whether to show a progress bar on the terminal, or without one to log a line every three minutes.

        Raises:
            ValueError: If inputs have different numbers of items, a prompt is longer than the music, or the model does
                not accept an input.
        """
        request = MusicRequest.of(locals())
        if not 0 <= fade_out_seconds < inf:
            raise ValueError(f"fade_out_seconds must be finite and not negative, got {fade_out_seconds}")
        bars, hz = ProgressBars(), self.sample_hz

        def report(known: int, requested: int) -> None:
            if progress:
                bars("music", known, requested)
            if callback is not None:
                callback(known, requested)

        try:
            with eval_mode(self):
                decoder, sample_counts = self._decoder(request, report)
                decoder.advance()
                tokens = decoder.tokens.all()
                waves = decode_items(self.codec, tokens, sample_counts)
        finally:
            bars.close()
        return GeneratedMusic([_faded(wave, round(fade_out_seconds * hz)) for wave in waves], tokens.ids, hz)

    @typed
    def stream(
        self,
        texts: TextInput | None = None,
        *,
        num_samples: int | None = None,
        seconds: float | None = None,
        prompt: AudioInput | None = None,
        prompt_sample_hz: int | None = None,
        melody: MelodyInput | None = None,
        stems: Stems | None = None,
        melody_sample_hz: int | None = None,
        seeds: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = 250,
        top_p: float | None = None,
        guidance_scale: float = 3.0,
        stride_seconds: float | None = None,
        chunk_seconds: float = 1.0,
        callback: Callable[[int, int], None] | None = None,
    ) -> Iterator[GeneratedMusic]:
        """Generate music, and yield it in chunks while it is generated; `generate` documents the arguments.

        All chunks together have the tokens of `generate`, and its waves up to rounding errors. Memory does not grow
        with `seconds`. A chunk has at least `chunk_seconds` more music; the codec's look-ahead delays the first chunk.
        A codec without `decoder_stream` raises a ValueError.
        """
        request = MusicRequest.of(locals())
        check_durations(chunk_seconds=chunk_seconds)
        with torch.no_grad(), eval_mode(self):
            decoder, sample_counts = self._decoder(request, callback)
        waves, factor = WaveStreams(self.codec, sample_counts), self.codec.downsample_factor
        return self._chunks(decoder, waves, samples_covering(chunk_seconds, factor, self.sample_hz) // factor)

    def _chunks(self, decoder: SlidingWindowDecoder, waves: WaveStreams, chunk_frames: int) -> Iterator[GeneratedMusic]:
        """Advance a decoder by `chunk_frames` frames at a time, and yield the new music."""
        items = torch.arange(len(decoder.known_frames))
        taken, is_done = torch.zeros_like(items), False
        while not is_done:
            with torch.no_grad(), eval_mode(self):
                unfinished = decoder.known_frames[~decoder.are_done]
                decoder.advance(chunk_frames + int(unfinished.min()) if len(unfinished) else 0)
                known = decoder.known_frames
                tokens, taken = decoder.tokens.between(items, taken, known), known
                decoder.tokens.drop_before(taken.clamp(max=decoder.first_input_frame()))
                is_done = bool(decoder.are_done.all())
                parts = waves.push(tokens, decoder.are_done.tolist())
            yield GeneratedMusic(parts, tokens.ids, self.sample_hz)

    def _decoder(
        self, request: MusicRequest, callback: Callable[[int, int], None] | None
    ) -> tuple[SlidingWindowDecoder, list[int]]:
        """Build the decoder of a request; also return the number of samples of every item."""
        schedules = request.text_schedules()
        if self.text_conditioner is None and any(map(any, schedules)):
            raise ValueError("the model has no text condition; omit texts, or build it with a text_conditioner")
        report_unknown_words(self, [text for texts in schedules for text in texts if text])
        waves, melodies = request.prompts(self.sample_hz), request.melodies(self.sample_hz, self.chroma)
        batch = request.num_items(texts=len(schedules), prompt=len(waves), melody=len(melodies))
        num_codebooks = self.transformer.layout.predicted[0].num_levels
        prompt = TokenBatch.empty(batch, num_codebooks)
        if waves:
            encoded = acoustic_tokens(waves, self.codec, self.device).expand(batch)
            prompt = TokenBatch(encoded.ids[..., :num_codebooks], encoded.lengths)
        prompt_seconds = [wave.shape[-1] / hz for wave, hz in waves] or [0.0]
        seconds = [
            self.default_seconds + before if request.seconds is None else request.seconds for before in prompt_seconds
        ]
        factor = self.codec.downsample_factor
        sample_counts = [samples_covering(length, factor, self.sample_hz) for length in seconds]
        sample_counts *= batch // len(sample_counts)
        num_frames = torch.tensor([self.codec.num_frames(count) for count in sample_counts])
        window_frames, stride_frames = self._window(int(num_frames.max()), request.stride_seconds)
        settings = request.settings
        if not any(map(any, schedules)) and not any(melodies):
            settings = replace(settings, guidance_scale=1.0)
        decoder = SlidingWindowDecoder(
            self.transformer,
            num_frames,
            prompt=prompt,
            window_frames=window_frames,
            stride_frames=stride_frames,
            batch_size=batch,
            conditioning=lambda window: self._conditions(window, stride_frames, schedules, melodies),
            settings=settings,
            seeds=[stage_generator(seed, self.transformer.namespace) for seed in request.item_seeds(batch)],
            callback=callback,
        )
        return decoder, sample_counts

    def _window(self, num_frames: int, stride_seconds: float | None) -> tuple[int | None, int | None]:
        """Return length and stride of the windows in frames; None for music of one window."""
        window_frames = self.transformer.window_frames
        if window_frames is None or num_frames <= window_frames:
            return window_frames, None
        if stride_seconds is None:
            return window_frames, max(1, round(self.stride_share * window_frames))
        return window_frames, frames_inside(stride_seconds, self.transformer.layout.predicted[0].exact_hz)

    def _conditions(
        self, window: range, stride_frames: int | None, schedules: list[list[str | None]], melodies: list[Melody | None]
    ) -> Conditions:
        """Compute the conditions of a window, of 1 or b items."""
        number = window.start // (stride_frames or 1)
        conditions: dict[str, ConditionTensor] = {}
        if self.text_conditioner is not None:
            texts = [schedule[min(number, len(schedule) - 1)] for schedule in schedules]
            states = self.text_conditioner.states_of(texts, self.device)
            conditions["text"] = _nothing(self.text_conditioner.dim, self.device) if states is None else states
        if self.chroma is not None:
            rate_hz = self.transformer.layout.predicted[0].exact_hz
            start_seconds = None if stride_frames is None else float(window.start / rate_hz)
            conditions["melody"] = _nothing(self.chroma.num_classes, self.device, self.chroma.num_frames)
            if melodies:
                rows = [(melody or Melody()).window(self.chroma, start_seconds) for melody in melodies]
                is_missing = torch.tensor([melody is None for melody in melodies])
                conditions["melody"] = ConditionTensor.of(torch.stack(rows).to(self.device)).without_items(is_missing)
        return conditions


class AudioGen(MusicGen):
    """Generates sounds from texts: a MusicGen with the lengths of AudioGen (arXiv:2209.15352) in audiocraft."""

    default_seconds = 5.0
    default_max_seconds = 10.0
    stride_share = 0.2


def _nothing(width: int, device: torch.device, num_rows: int = 1) -> ConditionTensor:
    """Return a condition of one item that is unconditional."""
    mask = torch.zeros(1, num_rows, dtype=torch.bool, device=device)
    return ConditionTensor(torch.zeros(1, num_rows, width, device=device), mask)


def _faded(wave: Tensor, num_samples: int) -> Tensor:
    """Multiply the last samples of a wave `[n]` or `[c, n]` by a ramp from 1 to 0."""
    count = min(num_samples, wave.shape[-1])
    if count:
        wave = torch.cat((wave[..., :-count], wave[..., -count:] * torch.linspace(1, 0, count).to(wave)), dim=-1)
    return wave
