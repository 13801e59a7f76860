"""Exact and approximate matches of semantic tokens with training clips (MusicLM, arXiv:2301.11325, sec. 5)."""

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, UnmetNeed
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["Memorisation", "SemanticTokens", "longest_shared_runs", "matching_cost"]

# Training clips per clip for which the costly transport problem is solved.
_NUM_CANDIDATES = 10
_REAL_QUANTILE = 0.01
_BREAK = -1


class SemanticTokens(Extractor):
    """Semantic tokens `[b, t]` of clips."""

    def __init__(self, tokenizer: SemanticTokenizer) -> None:
        self.tokenizer, self.sample_hz = tokenizer, tokenizer.target_sample_hz
        self.seconds_per_token = tokenizer.downsample_factor / tokenizer.target_sample_hz
        self.name, self.windows = "semantic tokens", f"{1 / self.seconds_per_token:g} tokens a second"

    def __call__(self, waves: Tensor) -> Tensor:
        """Compute the tokens of waves `[b, n]`."""
        return self.tokenizer(waves.to(device_of(self.tokenizer)))

    def fingerprint(self) -> str:
        """Hash of the tokenizer."""
        return part_fingerprint(self.tokenizer)


@typed
def longest_shared_runs(queries: list[Tensor], references: list[Tensor]) -> np.ndarray:
    """Length `[n]` of the longest run of tokens of each query that occurs in one of the references, at any time."""
    training = np.concatenate([np.append(tokens.numpy(), _BREAK) for tokens in references])
    longest = np.zeros(len(queries), dtype=int)
    for number, query in enumerate(queries):
        runs = np.zeros(len(training), dtype=np.int32)
        for token in query.tolist():
            # runs[i] is the length of the shared run that ends at training token i and at this query token.
            runs = np.where(training == token, np.concatenate([[0], runs[:-1]]) + 1, 0)
            longest[number] = max(longest[number], int(runs.max()))
    return longest


@typed
def matching_cost(a: Tensor, b: Tensor, distances: np.ndarray) -> float:
    """Cost of transporting the histogram of the tokens `a` to that of the tokens `b` (optimal transport), per token.

    Moving token i to token j costs `distances[i, j]`, the distance of their centroids. The longer one of two token
    sequences is cut. MusicLM approximates this cost by Sinkhorn's algorithm; for equally many tokens it is the cost of
    the best assignment, which is computed exactly.
    """
    from scipy.optimize import linear_sum_assignment

    count = min(len(a), len(b))
    costs = distances[a[:count].numpy()[:, None], b[:count].numpy()]
    return float(costs[linear_sum_assignment(costs)].mean())


class Memorisation(Metric):
    """Runs of semantic tokens that clips share with training clips, and how near their token histograms are.

    - Exact: the mean length of the longest shared run, and the share of clips with a run of at least `exact_seconds`.
    - Approximate: the mean cost of the nearest training clip, and the share of clips that are nearer to a training clip
      than 99% of the real clips are. Only the ten training clips with the nearest mean centroid are compared. (The cost
      is at least the distance of the mean centroids.)
    """

    name = "memorisation"
    uses_training = True
    extractor: SemanticTokens

    def __init__(self, tokens: SemanticTokens, exact_seconds: float = 2.0) -> None:
        super().__init__(tokens)
        self.exact_seconds = exact_seconds
        centroids = getattr(tokens.tokenizer, "centroids", None)
        self._centroids: Tensor | None = None if centroids is None else centroids.detach().float().cpu()

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure the clips against the training clips."""
        if training is None:
            raise UnmetNeed(f"{self.name} needs the training clips; pass --training")
        references, queries = training.of(self.extractor), clips.of(self.extractor)
        prefix = f"{self.name} / {clips.name}"
        note = f"{self.extractor.note()}; against {len(training)} training clips"
        seconds = longest_shared_runs(queries, references) * self.extractor.seconds_per_token
        is_exact = seconds >= self.exact_seconds
        values = [
            MetricValue.mean(f"{prefix} / longest shared run, seconds", seconds, None, note),
            MetricValue.mean(f"{prefix} / exact matches of {self.exact_seconds:g} s", is_exact, None, note),
        ]
        if self._centroids is None:
            return values
        costs = _nearest_costs(queries, references, self._centroids)
        values.append(MetricValue.mean(f"{prefix} / cost of the nearest training clip", costs, None, note))
        if real is not None:
            real_costs = _nearest_costs(real.of(self.extractor), references, self._centroids)
            limit = np.quantile(real_costs, _REAL_QUANTILE)
            values.append(MetricValue.mean(f"{prefix} / approximate matches", costs < limit, _REAL_QUANTILE, note))
        return values


def _nearest_costs(queries: list[Tensor], references: list[Tensor], centroids: Tensor) -> np.ndarray:
    """Return the cost `[n]` of the nearest reference of each query."""
    distances = torch.cdist(centroids, centroids).numpy()
    means = torch.stack([centroids[tokens].mean(dim=0) for tokens in references])
    costs = []
    for query in queries:
        bounds = torch.linalg.vector_norm(means - centroids[query].mean(dim=0), dim=1)
        nearest = bounds.argsort()[:_NUM_CANDIDATES].tolist()
        costs.append(min(matching_cost(query, references[index], distances) for index in nearest))
    return np.array(costs)
