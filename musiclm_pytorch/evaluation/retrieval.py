"""Retrieval in both directions: does a caption find its clip among the others, and a clip its caption?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import comb

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from musiclm_pytorch.evaluation.report import Metric

__all__ = ["Retrieval", "different_captions", "relevance_of", "retrieval", "retrieval_both"]


@dataclass(frozen=True)
class Retrieval:
    """How a set of queries fared.

    Attributes:
        ranks: `[t]` place of the best relevant candidate of each query, 1 is the top.
        average_precisions: `[t]` average precision of each query.
        num_relevant: `[t]` relevant candidates of each query.
        num_candidates: Candidates that were ranked.
    """

    ranks: np.ndarray
    average_precisions: np.ndarray
    num_relevant: np.ndarray
    num_candidates: int

    def metrics(self, name: str, cutoffs: Sequence[int] = (1, 5, 10)) -> list[Metric]:
        """Recall at some cutoffs, median rank and mean average precision, each beside what a random order gives.

        Args:
            name: Beginning of the metrics' names.
            cutoffs: How many of the first candidates count.

        Returns:
            One metric per cutoff, then `median rank` and `mAP`.
        """
        count = len(self.ranks)
        metrics = [
            Metric.measured(f"{name} / R@{cutoff}", partial(self._recall, cutoff), count, self.chance_recall(cutoff))
            for cutoff in cutoffs
        ]
        # A random order puts the first of r among n at (n + 1) / (r + 1) on average.
        random_rank = float(np.median((self.num_candidates + 1) / (self.num_relevant + 1)))
        metrics.append(Metric.measured(f"{name} / median rank", self._median_rank, count, random_rank))
        metrics.append(Metric.measured(f"{name} / mAP", self._mean_precision, count, self.chance_precision()))
        return metrics

    def _recall(self, cutoff: int, chosen: np.ndarray) -> float:
        return float((self.ranks[chosen] <= cutoff).mean())

    def _median_rank(self, chosen: np.ndarray) -> float:
        return float(np.median(self.ranks[chosen]))

    def _mean_precision(self, chosen: np.ndarray) -> float:
        return float(self.average_precisions[chosen].mean())

    def chance_recall(self, cutoff: int) -> float:
        """Recall at a cutoff that a random order has on average."""
        n, k = self.num_candidates, min(cutoff, self.num_candidates)
        return float(np.mean([1 - comb(n - int(r), k) / comb(n, k) for r in self.num_relevant]))

    def chance_precision(self) -> float:
        """Average precision that a random order has on average.

        A place k holds a relevant candidate with probability r / n, and of the k - 1 before it (r - 1) / (n - 1) are
        relevant on average; summed over places and divided by r.
        """
        n = self.num_candidates
        harmonic = float((1 / np.arange(1, n + 1)).sum())
        others = (self.num_relevant - 1) / max(n - 1, 1)
        return float(np.mean((harmonic + others * (n - harmonic)) / n))


@beartype
def relevance_of(captions: Sequence[str]) -> Tensor:
    """Say which clips each caption describes: its own, and all with a caption of the same words.

    Args:
        captions: Caption of each clip.

    Returns:
        `[n, n]` bool, queries by clips.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([numbers[caption] for caption in captions])
    return ids[:, None] == ids[None, :]


@beartype
def different_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """List every caption once, and say which clips it describes.

    A caption of several clips is one question with several right answers, and one answer, not several that take the
    first places together.

    Args:
        captions: All captions of each clip; a clip without any is only something to be found.

    Returns:
        The t different captions in the order of their first clips, and `[t, clips]` bool: caption by clip.
    """
    numbers: dict[str, int] = {}
    for own in captions:
        for caption in own:
            numbers.setdefault(caption, len(numbers))
    relevant = torch.zeros(len(numbers), len(captions), dtype=torch.bool)
    for clip, own in enumerate(captions):
        relevant[[numbers[caption] for caption in own], clip] = True
    return list(numbers), relevant


@beartype
def retrieval_both(audio_latents: Tensor, text_latents: Tensor, relevant: Tensor) -> dict[str, Retrieval]:
    """Search clips by texts, and texts by clips.

    Args:
        audio_latents: `[c, d]` of clips, unit norm.
        text_latents: `[t, d]` of texts, unit norm, each text once (see `different_captions`).
        relevant: `[t, c]` bool: which clips a text describes. A clip that no text describes is searched for, but does
            not search.

    Returns:
        "text to audio" and "audio to text".

    Raises:
        ValueError: If shapes do not fit, a text describes no clip, or a latent is NaN.
    """
    if audio_latents.ndim != 2 or text_latents.ndim != 2 or audio_latents.shape[1] != text_latents.shape[1]:
        raise ValueError(
            "audio and text latents must be [c, d] and [t, d], got "
            f"{tuple(audio_latents.shape)} and {tuple(text_latents.shape)}"
        )
    similarities = text_latents.float() @ audio_latents.float().to(text_latents.device).T
    relevant = relevant.to(similarities.device)
    found = {"text to audio": retrieval(similarities, relevant)}
    described = relevant.any(dim=0)
    found["audio to text"] = retrieval(similarities.T[described], relevant.T[described])
    return found


@beartype
def retrieval(similarities: Tensor, relevant: Tensor) -> Retrieval:
    """Rank candidates for each query.

    Ties count against the query: a model that finds all clips alike retrieves nothing.

    Args:
        similarities: `[t, c]`, queries by candidates, larger is nearer.
        relevant: `[t, c]` bool, at least one True a row.

    Returns:
        Ranks and average precisions.

    Raises:
        ValueError: If the shapes differ, a query has nothing relevant, or a similarity is NaN.
    """
    if similarities.ndim != 2 or similarities.shape != relevant.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"similarities and relevant (bool) must both be [t, c], got {tuple(similarities.shape)} and "
            f"{relevant.dtype} {tuple(relevant.shape)}"
        )
    if torch.isnan(similarities).any() or not relevant.any(dim=1).all():
        raise ValueError("similarities must hold no NaN, and each query needs at least one relevant candidate")
    # Among equals the irrelevant come first: stable sorts, the least significant key first.
    by_relevance = relevant.long().argsort(dim=1, stable=True)
    by_similarity = similarities.gather(1, by_relevance).argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, by_relevance.gather(1, by_similarity)).double()
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precisions = (hits.cumsum(dim=1) / places * hits).sum(dim=1) / hits.sum(dim=1)
    return Retrieval(
        ranks=(hits.argmax(dim=1) + 1).cpu().numpy(),
        average_precisions=precisions.cpu().numpy(),
        num_relevant=relevant.sum(dim=1).cpu().numpy(),
        num_candidates=similarities.shape[1],
    )
