"""Retrieval of clips by captions and of captions by clips: rank, recall and average precision with chance levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["Retrieval", "different_captions", "retrieval"]


@dataclass(frozen=True)
class Retrieval:
    """Ranks and precisions of a retrieval test with t queries; all arrays are `[t]`.

    The rank of a query is the best rank of a relevant candidate; 1 is the best rank.
    """

    ranks: np.ndarray
    average_precisions: np.ndarray
    num_relevant: np.ndarray
    num_candidates: int

    def metrics(self, name: str, note: str = "") -> list[MetricValue]:
        """Compute recall at ranks 1, 5 and 10, median rank and mean average precision, named `NAME / R@1` and so on."""

        def median_rank(rows: np.ndarray) -> float:
            return float(np.median(self.ranks[rows]))

        # In a random order the first of r relevant candidates among n has rank (n + 1) / (r + 1) on average.
        random_rank = float(np.median((self.num_candidates + 1) / (self.num_relevant + 1)))
        return [
            *(MetricValue.mean(f"{name} / R@{k}", self.ranks <= k, self.chance_recall(k), note) for k in (1, 5, 10)),
            MetricValue.measured(f"{name} / median rank", median_rank, len(self.ranks), random_rank, note),
            MetricValue.mean(f"{name} / mAP", self.average_precisions, self.chance_precision(), note),
        ]

    def chance_recall(self, cutoff: int) -> float:
        """Expected recall at rank `cutoff` if the candidates are in random order."""
        n, k = self.num_candidates, min(cutoff, self.num_candidates)
        return float(np.mean([1 - comb(n - int(r), k) / comb(n, k) for r in self.num_relevant]))

    def chance_precision(self) -> float:
        """Expected average precision if the candidates are in random order.

        In a random order of n candidates, the rank k of a relevant candidate is uniform in 1..n. If r candidates are
        relevant, the expected number of other relevant candidates before rank k is (k - 1) (r - 1) / (n - 1).
        """
        n = self.num_candidates
        harmonic = float((1 / np.arange(1, n + 1)).sum())
        remaining = (self.num_relevant - 1) / max(n - 1, 1)
        return float(np.mean((harmonic + remaining * (n - harmonic)) / n))


@typed
def different_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """List every different caption once, and mark the clips that each caption describes.

    In retrieval, a caption of several clips is one query with several right answers. The t different captions are in
    the order of their first occurrence. The mask `[t, clips]` is True where a caption describes a clip.
    """
    unique = list(dict.fromkeys(caption for of_clip in captions for caption in of_clip))
    index = {caption: number for number, caption in enumerate(unique)}
    relevant = torch.zeros(len(unique), len(captions), dtype=torch.bool)
    for clip, of_clip in enumerate(captions):
        relevant[[index[caption] for caption in of_clip], clip] = True
    return unique, relevant


@typed
def retrieval(similarities: Tensor, relevant: Tensor) -> Retrieval:
    """Rank the candidates of each query by similarity, the most similar candidate first.

    `similarities` and `relevant` are `[t, c]`, with a row per query and a column per candidate. Among candidates of
    equal similarity, relevant candidates are ranked last, so that constant similarities have the worst ranks.
    """
    if similarities.ndim != 2 or similarities.shape != relevant.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"similarities and relevant (bool) must both be [t, c], got similarities {tuple(similarities.shape)} and "
            f"relevant {relevant.dtype} {tuple(relevant.shape)}"
        )
    if torch.isnan(similarities).any() or not relevant.any(dim=1).all():
        raise ValueError("similarities must not contain NaN, and each query needs at least one relevant candidate")
    # Stable sorts, the least significant key first: among equal similarities the irrelevant candidates come first.
    by_relevance = relevant.long().argsort(dim=1, stable=True)
    by_similarity = similarities.gather(1, by_relevance).argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, by_relevance.gather(1, by_similarity)).double()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precisions = (hits.cumsum(dim=1) / ranks * hits).sum(dim=1) / hits.sum(dim=1)
    return Retrieval(
        ranks=(hits.argmax(dim=1) + 1).cpu().numpy(),
        average_precisions=precisions.cpu().numpy(),
        num_relevant=relevant.sum(dim=1).cpu().numpy(),
        num_candidates=similarities.shape[1],
    )
