"""MusicLM: a sentence in, music out; several candidates at once, the one that fits the sentence best is returned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from beartype import beartype
from einops import rearrange, repeat
from torch import Tensor, nn

from audiolm_pytorch.audio.files import peak_safe
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.nn.module_state import eval_mode
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = ["Candidates", "MusicLM"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Everything that was generated for some prompts.

    Attributes:
        waves: `[prompts, candidates, n]` (`[prompts, candidates, c, n]` for a codec of several channels) float32 in
            -1..1, in the order of `seeds`.
        scores: `[prompts, candidates]` cosine of MuLaN's embeddings of the prompt and of the candidate, -1..1.
        seeds: One a candidate, for each prompt: `seeds=[seed]` gives that candidate again, alone.
        order: `[prompts, candidates]` int64, indices of candidates, best first.
        sample_hz: Sample rate of the waves in Hz.
    """

    waves: Tensor
    scores: Tensor
    seeds: tuple[tuple[int, ...], ...]
    order: Tensor
    sample_hz: int

    @property
    def best(self) -> Tensor:
        """Best candidate of each prompt, `[prompts, n]` (`[prompts, c, n]`)."""
        return self.waves[torch.arange(len(self.waves)), self.order[:, 0].to(self.waves.device)]


class MusicLM(nn.Module):
    """Text to music (arXiv:2301.11325): an AudioLM conditioned on MuLaN codes of the text, and a ranking of candidates.

    Args:
        audio_lm: Generates; trained on codes of audio from the same quantizer.
        mulan_embed_quantizer: Turns texts into codes; has a namespace for each stage that takes a condition.
        num_levels: Levels of codes to condition on where a call does not say; None = all.

    Raises:
        ValueError: If no stage takes a condition, a stage has no namespace of its own, or one of another width, or was
            trained on the codes of another quantizer, or there are not so many levels.
    """

    @beartype
    def __init__(
        self, *, audio_lm: AudioLM, mulan_embed_quantizer: MuLaNEmbedQuantizer, num_levels: int | None = None
    ) -> None:
        super().__init__()
        widths = {name: stage.transformer.cond_dim for name, stage in audio_lm.stages.items()}
        self.conditioned = tuple(name for name, width in widths.items() if width is not None)
        if not self.conditioned:
            raise ValueError("no stage takes a condition: build transformers with audio_text_condition=True")
        given = dict(zip(mulan_embed_quantizer.namespaces, mulan_embed_quantizer.conditioning_dims))
        wrong = [name for name in self.conditioned if given.get(name) != widths[name]]
        if wrong:
            raise ValueError(
                "every stage needs the namespace that it was trained with: the quantizer has namespaces of widths "
                f"{given}, the stages take {widths}; look at {wrong}"
            )
        for name in self.conditioned:
            check_compatible(audio_lm.stages[name].transformer, audio_conditioner=mulan_embed_quantizer)
        self.audio_lm = audio_lm
        self.mulan_embed_quantizer = mulan_embed_quantizer
        self.num_levels = self._checked_levels(num_levels)

    @property
    def sample_hz(self) -> int:
        """Sample rate in Hz of what is generated."""
        return self.audio_lm.codec.target_sample_hz

    @beartype
    @torch.no_grad()
    def forward(
        self,
        text: str | Sequence[str],
        *,
        num_samples: int = 4,
        seconds: float | int = 5.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        num_levels: int | None = None,
        max_batch: int = 16,
        return_all: bool = False,
        **generation: Any,
    ) -> Tensor | Candidates:
        """Make music for one prompt or for several.

        A candidate is a function of its prompt and its seed alone, whatever else is generated beside it.

        Args:
            text: A prompt, or several.
            num_samples: Candidates a prompt.
            seconds: Length of the music.
            seed: Candidates get the seeds `seed`, `seed + 1`, …; None = drawn from torch's global generator.
            seeds: One seed a candidate, instead of `seed`.
            num_levels: Condition on the first so many levels of codes only. Text and audio agree on the first levels
                far more often than on the last, and models trained with dropped levels can do without. None = as many
                as the model was built with.
            max_batch: Candidates, of all prompts together, generated at a time; more means faster and more memory.
            return_all: Give all candidates with their scores.
            **generation: Further fields of `GenerationRequest`, e.g. `prime_wave`, what to continue (`seconds` counts
                it in), `sampling` or `callback`. Inputs are given once for all prompts, or once a prompt.

        Returns:
            Tensor `[prompts, n]` float32 (prompts = 1 for a str; `[prompts, c, n]` for a codec of several channels)
            at `sample_hz`, peaks below 1: each prompt's own candidate of highest score. With `return_all`, a
            `Candidates`.

        Raises:
            ValueError: If a prompt is empty, a number is out of range, or inputs are neither one nor one a prompt.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        chosen = _chosen_seeds(num_samples, seed, seeds)
        if not seconds > 0 or max_batch < 1:
            raise ValueError(f"seconds and max_batch must be positive, got {seconds} and {max_batch}")
        levels = self.num_levels if num_levels is None else self._checked_levels(num_levels)
        _check_generation(generation)
        # dropout would make a candidate depend on more than its seed
        with eval_mode(self):
            conditions = self._conditions(prompts, levels)
            request = GenerationRequest(
                batch_size=len(prompts), seconds=seconds, conditioning=conditions, allow_eos=False, **generation
            )
            if request.num_items != len(prompts):
                raise ValueError(
                    f"give inputs once for all, or once for each of {len(prompts)} prompts, not more often"
                )
            waves = self._generate(request, chosen, max_batch)
            waves = rearrange(waves, "(p k) ... -> p k ...", p=len(prompts))
            if num_samples == 1 and not return_all:
                return waves[:, 0]
            scores = self.scores(prompts, waves, max_batch=max_batch)
        # a candidate that is not even finite must not win
        order = scores.nan_to_num(nan=-2.0).argsort(dim=1, descending=True, stable=True)
        candidates = Candidates(waves, scores, (tuple(chosen),) * len(prompts), order, self.sample_hz)
        return candidates if return_all else candidates.best

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], waves: Tensor, *, max_batch: int = 16) -> Tensor:
        """Cosine of MuLaN's embeddings of each prompt and of each of its own candidates.

        Args:
            prompts: Texts.
            waves: `[prompts, candidates, n]` or `[prompts, candidates, c, n]` at `sample_hz`.
            max_batch: Candidates embedded at a time.

        Returns:
            `[prompts, candidates]` in -1..1; NaN for a wave that is not finite.
        """
        mulan = self.mulan_embed_quantizer.mulan
        text_latents = mulan.get_text_latents(prompts)
        rows = rearrange(waves if waves.ndim == 3 else waves.mean(dim=2), "p k n -> (p k) n")
        finite = torch.isfinite(rows).all(dim=1)
        rows = resample(rows.nan_to_num(0.0, 0.0, 0.0), self.sample_hz, mulan.sample_hz).to(text_latents.device)
        latents = torch.cat([mulan.get_long_audio_latents(part) for part in rows.split(max_batch)])
        own = repeat(text_latents, "p d -> (p k) d", k=waves.shape[1])
        scores = (latents * own).sum(dim=1).masked_fill(~finite.to(latents.device), torch.nan)
        return rearrange(scores, "(p k) -> p k", p=len(prompts))

    def _checked_levels(self, num_levels: int | None) -> int:
        """As many levels as wanted, or all; ValueError if there are fewer."""
        most = self.mulan_embed_quantizer.num_quantizers
        levels = most if num_levels is None else num_levels
        if not 1 <= levels <= most:
            raise ValueError(f"num_levels must be in 1..{most}, got {levels}")
        return levels

    def _conditions(self, prompts: list[str], num_levels: int) -> dict[str, Conditions]:
        """Condition of every stage, an item for each prompt."""
        codes = self.mulan_embed_quantizer.codes(texts=prompts)
        keep = torch.full((len(codes),), num_levels)
        # every stage was trained with a table of its own; one stage's embeddings mean nothing to another
        return {
            stage: Conditions(
                codes=self.mulan_embed_quantizer.conditioning(codes=codes, namespace=stage).without_trailing(keep)
            )
            for stage in self.conditioned
        }

    def _generate(self, request: GenerationRequest, seeds: list[int], max_batch: int) -> Tensor:
        """Peak-safe waves `[b, ...]`, one of every item for each seed, in as few batches as `max_batch` allows."""
        candidates = [(item, seed) for item in range(request.num_items) for seed in seeds]
        waves: list[Tensor] = []
        for start in range(0, len(candidates), max_batch):
            items, own_seeds = zip(*candidates[start : start + max_batch])
            part = replace(request.select(items), seeds=own_seeds)
            waves.extend(peak_safe(wave.float()) for wave in self.audio_lm(**vars(part)))
        return torch.stack(waves)


def _check_generation(generation: Mapping[str, Any]) -> None:
    """Refuse what a prompt and its candidates decide already."""
    decided = {"batch_size", "conditioning", "wavs", "codes", "allow_eos"} & set(generation)
    if decided:
        raise ValueError(
            f"{sorted(decided)} cannot be chosen here: texts are the conditions, and candidates are num_samples a "
            "prompt, of exactly so many seconds; for anything else call audio_lm"
        )


def _chosen_seeds(num_samples: int, seed: int | None, seeds: Sequence[int] | None) -> list[int]:
    """One seed for each candidate of a prompt."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if seeds is not None:
        if seed is not None or len(seeds) != num_samples:
            raise ValueError(f"give either seed or {num_samples} seeds (one a candidate), got {seed} and {len(seeds)}")
        return list(seeds)
    first = int(torch.randint(2**31, ())) if seed is None else seed
    return [first + index for index in range(num_samples)]
