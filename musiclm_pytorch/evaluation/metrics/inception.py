"""Inception score: whether clips are classified with confidence and belong to many classes (arXiv:1606.03498)."""

import numpy as np

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.metric import ClipSet, Metric
from musiclm_pytorch.evaluation.metrics.kl_divergence import kl_divergence
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["InceptionScore", "inception_score"]


@typed
def inception_score(posteriors: np.ndarray) -> float:
    """Compute exp of the mean KL divergence of class probabilities `[n, k]` and their mean; 1..k."""
    return float(np.exp(kl_divergence(posteriors, posteriors.mean(axis=0)).mean()))


class InceptionScore(Metric):
    """Inception score of the class probabilities of a classifier."""

    name = "inception score ({})"

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure the clips; a single clip has the score 1."""
        posteriors = clips.posteriors(self.extractor)
        name = f"{self.name} / {clips.name}"
        note = self.extractor.note()
        return [MetricValue.measured(name, lambda rows: inception_score(posteriors[rows]), len(clips), None, note)]
