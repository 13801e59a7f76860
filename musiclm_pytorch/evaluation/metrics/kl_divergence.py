"""Kullback-Leibler divergence of the class probabilities of each clip and its real clip (KLD of MusicLM)."""

import numpy as np

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.metric import ClipSet, Metric, require_references
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["KLDivergence", "kl_divergence"]

_MIN_PROBABILITY = 1e-6


@typed
def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Compute sum p log(p / q) over the last axis, in nats, of probabilities that sum to 1."""
    p, q = (np.asarray(part, dtype=np.float64).clip(min=_MIN_PROBABILITY) for part in (p, q))
    return np.asarray((p * np.log(p / q)).sum(axis=-1))


class KLDivergence(Metric):
    """Mean KL(real clip || clip) of a classifier; the chance level compares each clip with all other real clips."""

    name = "KL divergence ({})"

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Compare each clip with its real clip."""
        real, references = require_references(clips, real, self)
        expected, got = real.posteriors(self.extractor)[references], clips.posteriors(self.extractor)
        values = kl_divergence(expected, got)
        everybody = np.stack([kl_divergence(expected, row) for row in got])
        count = len(values)
        chance = None if count < 2 else float((everybody.sum() - np.trace(everybody)) / (count * (count - 1)))
        return [MetricValue.mean(f"{self.name} / {clips.name}", values, chance, self.extractor.note())]
