"""MusicLM: generates several pieces of music for a text and returns the one that matches the text best."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe
from audiolm_pytorch.audio.units import check_durations
from audiolm_pytorch.audio.waves import check_dtype, check_rate
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.checks.tracing import not_compiled
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.generation.prompts import read_prompts
from audiolm_pytorch.generation.request import ConditionChange, GeneratedAudio, GenerationRequest, Prompt
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.nn.module_state import check_positive, eval_mode
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.sharing import SharedModel
from audiolm_pytorch.saving.text import joined_lines
from musiclm_pytorch.generation.candidates import Candidates, MusicChunk, ranked, score_candidates, seeds_of_candidates
from musiclm_pytorch.generation.prompts import Mixture, MusicPrompt, embed_prompts, prompts_of, stories_of
from musiclm_pytorch.melody.embedder import MelodyEmbedder
from musiclm_pytorch.pretrained.parts import CARD, read_parts, save_parts
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = ["Candidates", "MusicChunk", "MusicLM"]


class MusicLM(SharedModel):
    """Text to music with an AudioLM that is conditioned on MuLaN codes of the text (arXiv:2301.11325).

    Args:
        audio_lm: AudioLM that was trained with codes of `mulan_embed_quantizer`.
        mulan_embed_quantizer: Quantizer of texts, with a namespace for each conditioned stage.
        num_levels: Default number of levels of codes to condition on; None = all levels.
        melody_embedder: Embedder of melodies that stages with a melody were trained with; None = text alone.

    Raises:
        ValueError: If no stage is conditioned, a conditioned stage has no fitting namespace or was trained with another
            quantizer or melody embedder, or `num_levels` is out of range.
    """

    main_file = CARD
    subfolders = ("", "model")  # of a model, and of a finished training run
    pipeline_tag = "text-to-audio"

    @typed
    def __init__(
        self,
        *,
        audio_lm: AudioLM,
        mulan_embed_quantizer: MuLaNEmbedQuantizer,
        num_levels: int | None = None,
        melody_embedder: MelodyEmbedder | None = None,
    ) -> None:
        super().__init__()
        widths = {name: stage.cond_dim for name, stage in audio_lm.stages.items()}
        self.conditioned = tuple(name for name, width in widths.items() if width is not None)
        if not self.conditioned:
            raise ValueError("no stage is conditioned; build transformers with audio_text_condition=True")
        namespaces = dict(zip(mulan_embed_quantizer.namespaces, mulan_embed_quantizer.conditioning_dims))
        wrong = [name for name in self.conditioned if namespaces.get(name) != widths[name]]
        if wrong:
            raise ValueError(
                f"the quantizer has namespaces with widths {namespaces}, but the stages need {widths}; they differ for "
                f"{wrong}; pass the quantizer that the stages were trained with"
            )
        for name in self.conditioned:
            check_compatible(audio_lm.stages[name], audio_conditioner=mulan_embed_quantizer)
        self.audio_lm, self.melody_embedder = audio_lm, melody_embedder
        if melody_embedder is not None:
            melody_embedder.check_compatible(audio_lm.stages)
        if mulan_embed_quantizer is audio_lm.audio_conditioner:
            # Not registered a second time, so that `state_dict` contains every tensor once.
            object.__setattr__(self, "mulan_embed_quantizer", mulan_embed_quantizer)
        else:
            self.mulan_embed_quantizer = mulan_embed_quantizer
        self.num_levels = self._checked_levels(num_levels)

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        audio_lm = self.audio_lm
        parts = {
            "codec": audio_lm.codec,
            "semantic_tokenizer": audio_lm.wav2vec,
            "quantizer": self.mulan_embed_quantizer,
            **audio_lm.stages,
            **({} if audio_lm.text_conditioner is None else {"text_conditioner": audio_lm.text_conditioner}),
            **({} if self.melody_embedder is None else {"melody": self.melody_embedder}),
        }
        save_parts(folder, parts, self.generation_settings, dtype)

    @property
    def generation_settings(self) -> dict[str, Any]:
        """Sampling settings and number of levels, as the card of a saved model stores them."""
        sampling = {name: asdict(settings) for name, settings in self.audio_lm.sampling.items()}
        return {"sampling": sampling, "num_levels": self.num_levels}

    @classmethod
    @preserve_rng()
    def _read(cls, folder: Path, source: str | Path, hub: Mapping[str, Any]) -> "MusicLM":
        card, parts = read_parts(folder)
        return cls.of_parts(parts, card, folder)

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any], card: Mapping[str, Any], source: str | Path) -> "MusicLM":
        """Build a model from parts (see `read_parts`); the ValueError for incompatible parts names their `source`."""
        try:
            audio_lm = AudioLM(
                wav2vec=parts["semantic_tokenizer"],
                codec=parts["codec"],
                semantic_transformer=parts["semantic"],
                coarse_transformer=parts["coarse"],
                fine_transformer=parts.get("fine"),
                audio_conditioner=parts["quantizer"],
                text_conditioner=parts.get("text_conditioner"),
                sampling=card.get("sampling"),
            )
            return cls(
                audio_lm=audio_lm,
                mulan_embed_quantizer=parts["quantizer"],
                num_levels=card.get("num_levels"),
                melody_embedder=parts.get("melody"),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the modules in {source} are not compatible: {joined_lines(error)}") from error

    @property
    def sample_hz(self) -> int:
        """Sample rate of the music in Hz."""
        return self.audio_lm.codec.target_sample_hz

    @not_compiled
    @typed
    @torch.no_grad()
    def forward(
        self,
        text: MusicPrompt | Sequence[MusicPrompt],
        *,
        melody: Prompt | Sequence[Prompt] | None = None,
        melody_sample_hz: int | None = None,
        negative_text: str | Mixture | Sequence[str | Mixture] | None = None,
        num_samples: int = 4,
        seconds: float = 5.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        num_levels: int | None = None,
        max_batch: int = 16,
        return_all: bool = False,
        prime_wave: Prompt | Sequence[Prompt] | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_lengths: Tensor | None = None,
        conditions: Mapping[str, Tensor | ConditionTensor] | None = None,
        input_streams: AudioTokens | None = None,
        coarse_only: bool = False,
        sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None,
        callback: Callable[[str, int, int], None] | None = None,
        progress: bool = False,
    ) -> Tensor | Candidates:
        """Generate music for one or several texts.

        A candidate depends only on its text and its seed, not on the other candidates. `GenerationRequest`
        documents the arguments that are not listed below; their tensors have 1 item for all texts, or 1 item per text.
        Empty texts, numbers out of range, and inputs with a wrong number of items raise a ValueError.

        Args:
            text: A text, a `Mixture`, or a story, a list of pairs of a start in seconds and a text or `Mixture`; or a
                list of these. A story of MusicLM (sec. 4.4) is one piece of music: `[(0, "a flute"), (15, "a cello")]`.
            melody: Hummed, whistled or played melody that the music follows, one or one per text; waves or paths of
                files, as in `prime_wave`. It begins with the music, prompt included; later music is free.
            melody_sample_hz: Sample rate in Hz of waves in `melody`; None = that of the model.
            negative_text: Text from which guidance leads away, one or one per text; needs a guidance scale above 1.
            num_samples: Number of candidates per text.
            seconds: Length of the music, including an audio prompt that is continued.
            seed: First seed; the candidates use `seed`, `seed + 1`, ...; None = drawn from torch's global generator.
            seeds: One seed per candidate, instead of `seed`.
            num_levels: Condition only on the first `num_levels` levels of codes, on which text and audio agree more
                often; None = default of the model. Models trained with quantizer dropout (random removal of the last
                quantizer levels) can also generate without the last levels.
            max_batch: Number of candidates, of all texts together, in one batch; more candidates need more memory.
            return_all: Whether to return all candidates with their scores.

        Returns:
            The best candidate of each text, `[prompts, n]` float32 (prompts = 1 for a str; `[prompts, c, n]` for a
            codec of several channels) at `sample_hz`, with peaks below 1; `Candidates` if `return_all` is set.
        """
        prompts = prompts_of(text)
        candidate_seeds = seeds_of_candidates(num_samples, seed, seeds)
        check_durations(seconds=seconds)
        check_positive(max_batch=max_batch)
        with eval_mode(self):
            request = self._request(
                prompts,
                seconds,
                num_levels,
                negative_text,
                self._melody_conditions(melody, melody_sample_hz),
                prime_wave=prime_wave,
                prime_wave_input_sample_hz=prime_wave_input_sample_hz,
                prime_lengths=prime_lengths,
                conditions=conditions,
                input_streams=input_streams,
                coarse_only=coarse_only,
                sampling=sampling,
                callback=callback,
                progress=progress,
            )
            waves = self._generate(request, candidate_seeds, max_batch)
            waves = rearrange(waves, "(p k) ... -> p k ...", p=len(prompts))
            if num_samples == 1 and not return_all:
                return waves[:, 0]
            scores = self.scores(prompts, waves, max_batch=max_batch)
        candidates = Candidates(waves, scores, (tuple(candidate_seeds),) * len(prompts), ranked(scores), self.sample_hz)
        return candidates if return_all else candidates.best

    @typed
    @torch.no_grad()
    def stream(
        self,
        text: MusicPrompt | Sequence[MusicPrompt],
        *,
        melody: Prompt | Sequence[Prompt] | None = None,
        melody_sample_hz: int | None = None,
        negative_text: str | Mixture | Sequence[str | Mixture] | None = None,
        num_samples: int = 1,
        seconds: float = 30.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        num_levels: int | None = None,
        chunk_seconds: float = 1.0,
        rank_seconds: float = 3.0,
        prime_wave: Prompt | Sequence[Prompt] | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_lengths: Tensor | None = None,
        conditions: Mapping[str, Tensor | ConditionTensor] | None = None,
        input_streams: AudioTokens | None = None,
        coarse_only: bool = False,
        sampling: Mapping[str, SamplingSettings | Mapping[str, Any]] | None = None,
        callback: Callable[[str, int, int], None] | None = None,
    ) -> Iterator[MusicChunk]:
        """Generate one piece of music per text, and return it in chunks while it is generated.

        With several candidates, MuLaN ranks only the first part of each candidate (see `rank_seconds`), and the stream
        begins with the first part of the best candidate. Before the second chunk, the best candidate is decoded again
        from its beginning. From one seed, `stream` and `forward` generate equal tokens. Samples can exceed 1, because
        chunks are returned before the peak of the whole wave is known, while `forward` scales the whole wave. Memory
        does not grow with `seconds`. `forward` documents the arguments that are not listed below. A codec without
        `decoder_stream` raises a ValueError.

        Args:
            num_samples: Number of candidates per text. A single candidate starts soonest, because it is not ranked.
            chunk_seconds: Minimum duration of a chunk, see `AudioLM.stream`.
            rank_seconds: Duration of the part of a candidate that is ranked, counted from the end of the audio prompt;
                the codec's look-ahead shortens it. MuLaN ranks longer parts more reliably.
        """
        prompts = prompts_of(text)
        candidate_seeds = seeds_of_candidates(num_samples, seed, seeds)
        chunk_seconds, rank_seconds = min(chunk_seconds, seconds), min(rank_seconds, seconds)
        check_durations(seconds=seconds, chunk_seconds=chunk_seconds, rank_seconds=rank_seconds)
        with eval_mode(self):
            request = self._request(
                prompts,
                seconds,
                num_levels,
                negative_text,
                self._melody_conditions(melody, melody_sample_hz),
                prime_wave=prime_wave,
                prime_wave_input_sample_hz=prime_wave_input_sample_hz,
                prime_lengths=prime_lengths,
                conditions=conditions,
                input_streams=input_streams,
                coarse_only=coarse_only,
                sampling=sampling,
                callback=callback,
            )
            if num_samples == 1:
                request = replace(request, seeds=candidate_seeds * len(prompts))
                stream = self.audio_lm.stream(request, chunk_seconds=chunk_seconds)
                return self._chunks(stream, candidate_seeds * len(prompts))
            # Texts are ranked one after the other, because their audio prompts can differ in length.
            candidates = [
                replace(request.select([item] * num_samples), seeds=candidate_seeds) for item in range(len(prompts))
            ]
            first_parts = [self.audio_lm.stream(part, chunk_seconds=rank_seconds) for part in candidates]
            has_more = rank_seconds < seconds
        return self._ranked_chunks(prompts, request, candidate_seeds, first_parts, chunk_seconds, has_more)

    @typed
    @torch.no_grad()
    def scores(self, prompts: Sequence[MusicPrompt], waves: Tensor, *, max_batch: int = 16) -> Tensor:
        """Cosine similarity `[prompts, candidates]` of the MuLaN embeddings of each prompt and its candidates.

        The score of a wave that is not finite is NaN. For a story, every part of a wave is compared with its own text,
        and the similarities are averaged over time.

        Args:
            prompts: Texts, mixtures or stories.
            waves: `[prompts, candidates, n]` or `[prompts, candidates, c, n]` at `sample_hz`.
            max_batch: Number of candidates that are embedded in one batch.

        Raises:
            ValueError: If the shape or dtype of `waves` is wrong, or `max_batch` is below 1.
        """
        check_positive(max_batch=max_batch)
        check_dtype(waves, "waves")
        if waves.ndim not in (3, 4) or len(waves) != len(prompts) or not waves.numel():
            raise ValueError(
                "waves must be [prompts, candidates, n] or [prompts, candidates, c, n] and not empty, "
                f"got shape {list(waves.shape)} for {len(prompts)} prompts"
            )
        quantizer = self.mulan_embed_quantizer
        stories = embed_prompts(stories_of(prompts), quantizer, self.sample_hz)
        return score_candidates(stories, waves, self.sample_hz, quantizer.mulan, max_batch)

    def _checked_levels(self, num_levels: int | None) -> int:
        """Check `num_levels` and return it; None becomes the number of all levels."""
        max_levels = self.mulan_embed_quantizer.num_quantizers
        levels = max_levels if num_levels is None else num_levels
        if not 1 <= levels <= max_levels:
            raise ValueError(f"num_levels must be in 1..{max_levels}, got {levels}")
        return levels

    def _request(
        self,
        prompts: list[MusicPrompt],
        seconds: float,
        num_levels: int | None,
        negative_text: str | Mixture | Sequence[str | Mixture] | None,
        melody: Mapping[str, Conditions] | None = None,
        **inputs: Any,
    ) -> GenerationRequest:
        """Build a request of one item per prompt, conditioned on the codes of the prompts."""
        levels = self.num_levels if num_levels is None else self._checked_levels(num_levels)
        stories = embed_prompts(stories_of(prompts), self.mulan_embed_quantizer, self.sample_hz)
        last_change = max(story[-1].seconds for story in stories)
        if last_change >= seconds:
            raise ValueError(f"a story changes after {last_change:g} s, but the music ends after {seconds:g} s")
        changes = []
        for number in range(1, max(map(len, stories))):
            times = [story[number].seconds if number < len(story) else inf for story in stories]
            later = [story[min(number, len(story) - 1)].codes for story in stories]
            changes.append(ConditionChange(torch.tensor(times, dtype=torch.float64), self._conditioning(later, levels)))
        negative = None
        if negative_text is not None:
            entries = embed_prompts(stories_of(prompts_of(negative_text)), self.mulan_embed_quantizer, self.sample_hz)
            negative = self._conditioning([entry.codes for entry, *_ in entries], levels)
        first, melody = self._conditioning([story[0].codes for story in stories], levels), melody or {}
        request = GenerationRequest(
            batch_size=len(prompts),
            seconds=seconds,
            conditioning={name: {**first.get(name, {}), **melody.get(name, {})} for name in {**first, **melody}},
            condition_changes=changes,
            negative_conditioning=negative,
            allow_eos=False,
            **inputs,
        )
        if request.num_items != len(prompts):
            raise ValueError(
                f"inputs must have 1 item, or 1 item per text ({len(prompts)}); got {request.num_items} items"
            )
        return request

    def _melody_conditions(self, melody: Prompt | Sequence[Prompt] | None, sample_hz: int | None) -> dict[str, Any]:
        """Embed melodies for each stage with a melody."""
        if melody is None:
            if sample_hz is not None:
                raise ValueError("got melody_sample_hz without melody; pass both or neither")
            return {}
        if self.melody_embedder is None:
            raise ValueError(
                "the model does not follow melodies; leave out the melody, or use a model that does, e.g. musicgen_tiny"
            )
        hz = self.sample_hz if sample_hz is None else check_rate(sample_hz, "melody_sample_hz")
        waves = read_prompts(melody, hz, name="melody")
        return self.melody_embedder.conditions(waves, self.audio_lm.stages)

    def _conditioning(self, codes: Sequence[Tensor], levels: int) -> dict[str, dict[str, ConditionTensor]]:
        """Embed the first `levels` codes of every item for each stage."""
        batch, quantizer = torch.stack(list(codes)), self.mulan_embed_quantizer
        keep = torch.full((len(batch),), levels)
        return {
            stage: {"codes": quantizer.conditioning(codes=batch, namespace=stage).without_trailing(keep)}
            for stage in self.conditioned
        }

    def _ranked_chunks(
        self,
        prompts: list[MusicPrompt],
        request: GenerationRequest,
        seeds: list[int],
        first_parts: list[Iterator[GeneratedAudio]],
        chunk_seconds: float,
        has_more: bool,
    ) -> Iterator[MusicChunk]:
        """Rank the first parts of all candidates, then yield the music of the best candidate of each text.

        `has_more` is False if a first part already has the duration of the whole music.
        """
        with eval_mode(self), torch.no_grad():
            # Each stream is removed from the list, so that the caches of its candidates are freed.
            parts = [next(first_parts.pop(0)).wave.float() for _ in prompts]
            peak_safe_parts = [torch.stack([peak_safe(wave) for wave in part]) for part in parts]
            scores = torch.cat([self.scores([text], part[None]) for text, part in zip(prompts, peak_safe_parts)])
            best = ranked(scores)[:, 0].tolist()
            waves = [part[candidate] for part, candidate in zip(parts, best)]
            selected = [seeds[candidate] for candidate in best]
            stream: Iterator[GeneratedAudio] = iter(())
            if has_more:
                # The seeds determine the candidates, so this stream repeats the first parts, which are skipped.
                stream = self.audio_lm.stream(replace(request, seeds=selected), chunk_seconds=chunk_seconds)
        yield from self._chunks(stream, selected, scores, waves)

    def _chunks(
        self,
        stream: Iterator[GeneratedAudio],
        seeds: Sequence[int],
        scores: Tensor | None = None,
        first_waves: Sequence[Tensor] = (),
    ) -> Iterator[MusicChunk]:
        """Yield `first_waves`, then the samples of `stream` that follow them."""
        if first_waves:
            yield MusicChunk(list(first_waves), self.sample_hz, tuple(seeds), scores)
        skipped = [wave.shape[-1] for wave in first_waves] or [0] * len(seeds)  # samples of each text
        while True:
            with eval_mode(self), torch.no_grad():  # between chunks, the modules have their own mode
                chunk = next(stream, None)
            if chunk is None:
                return
            waves = [wave[..., count:].float() for wave, count in zip(chunk.waves, skipped)]
            skipped = [max(0, count - wave.shape[-1]) for wave, count in zip(chunk.waves, skipped)]
            if any(wave.numel() for wave in waves):
                yield MusicChunk(waves, self.sample_hz, tuple(seeds), scores)

    def _generate(self, request: GenerationRequest, seeds: list[int], max_batch: int) -> Tensor:
        """Generate a wave with peaks below 1 for each pair (item, seed), in batches of at most `max_batch` waves."""
        candidates = [(item, seed) for item in range(request.num_items) for seed in seeds]
        waves: list[Tensor] = []
        for start in range(0, len(candidates), max_batch):
            items, item_seeds = zip(*candidates[start : start + max_batch])
            part = replace(request.select(items), seeds=item_seeds)
            waves.extend(peak_safe(wave.float()) for wave in self.audio_lm.generate(part).waves)
        return torch.stack(waves)
