"""Candidates of MusicLM, and the scores that rank them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.generation.sampling import item_seeds
from musiclm_pytorch.generation.prompts import EmbeddedPrompt
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = ["Candidates", "MusicChunk", "ranked", "score_candidates", "seeds_of_candidates"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Generated candidates for one or several text prompts, with scores.

    Attributes:
        waves: `[prompts, candidates, n]` (`[prompts, candidates, c, n]` for a codec of several channels) float32 in
            -1..1, in the order of `seeds`.
        scores: `[prompts, candidates]`, cosine similarity of the MuLaN embeddings of prompt and candidate.
        seeds: The candidates' seeds, equal for all prompts; `MusicLM` with `seeds=[seed]` generates a candidate again.
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
        """Best candidate of each prompt, `[prompts, n]` (`[prompts, c, n]` for several channels)."""
        return self.waves[torch.arange(len(self.waves)), self.order[:, 0].to(self.waves.device)]


@dataclass(frozen=True, eq=False)
class MusicChunk:
    """Part of the music that `MusicLM.stream` generates.

    Attributes:
        waves: The next samples of the music of each text, `[n_i]` (`[c, n_i]` for a codec of several channels) float32.
        sample_hz: Sample rate of the waves in Hz.
        seeds: Seed of the selected candidate of each text.
        scores: `[prompts, candidates]`, cosine similarity of the MuLaN embeddings of the text and the ranked part of
            each candidate; None for one candidate per text.
    """

    waves: list[Tensor]
    sample_hz: int
    seeds: tuple[int, ...]
    scores: Tensor | None

    @property
    def wave(self) -> Tensor:
        """All waves, `[prompts, n]` or `[prompts, c, n]`. Raises RuntimeError if the waves differ in length."""
        return torch.stack(self.waves)


def seeds_of_candidates(num_samples: int, seed: int | None, seeds: Sequence[int] | None) -> list[int]:
    """Return one seed per candidate of a prompt."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if seeds is not None:
        if seed is not None or len(seeds) != num_samples:
            raise ValueError(
                f"pass either seed or {num_samples} seeds, one per candidate; got seed {seed} and {len(seeds)} seeds"
            )
        return list(seeds)
    first = int(torch.randint(2**31, ())) if seed is None else seed
    return item_seeds(first, num_samples)


def ranked(scores: Tensor) -> Tensor:
    """Indices of the candidates `[prompts, candidates]`, best first. A candidate whose score is NaN is last."""
    return scores.nan_to_num(nan=-2.0).argsort(dim=1, descending=True, stable=True)


def score_candidates(
    stories: Sequence[Sequence[EmbeddedPrompt]], waves: Tensor, sample_hz: int, mulan: JointEmbedding, max_batch: int
) -> Tensor:
    """Score waves `[prompts, candidates, n]` or `[prompts, candidates, c, n]`; see `MusicLM.scores`."""
    num_prompts, num_candidates = waves.shape[:2]
    rows = rearrange(waves if waves.ndim == 3 else waves.mean(dim=2), "p k n -> (p k) n")
    finite = torch.isfinite(rows).all(dim=1)
    rows = resample(rows.nan_to_num(0.0, 0.0, 0.0), sample_hz, mulan.sample_hz).to(stories[0][0].latent.device)
    # Parts of equal position are embedded in one batch.
    latents_of_parts: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for prompt, story in enumerate(stories):
        starts = [min(round(entry.seconds * mulan.sample_hz), rows.shape[1]) for entry in story]
        for entry, start, stop in zip(story, starts, [*starts[1:], rows.shape[1]]):
            if start < stop:
                latents_of_parts.setdefault((start, stop), []).append((prompt, entry.latent))
    scores = torch.zeros(len(rows), device=rows.device)
    for (start, stop), entries in latents_of_parts.items():
        index = torch.tensor([prompt * num_candidates + k for prompt, _ in entries for k in range(num_candidates)])
        targets = torch.stack([latent for _, latent in entries]).repeat_interleave(num_candidates, dim=0)
        parts = rows[index.to(rows.device), start:stop].split(max_batch)
        latents = torch.cat([mulan.get_long_audio_latents(part) for part in parts])
        scores[index.to(rows.device)] += (latents * targets).sum(dim=1) * ((stop - start) / rows.shape[1])
    scores = scores.masked_fill(~finite.to(scores.device), torch.nan)
    return rearrange(scores, "(p k) -> p k", p=num_prompts)
