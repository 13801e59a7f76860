"""Diversity of a set of clips."""

import numpy as np

from musiclm_pytorch.evaluation.metric import ClipSet, Metric, UnmetNeed
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["Diversity"]


class Diversity(Metric):
    """Mean cosine distance of the embeddings of all pairs of clips.

    Embeddings are centred on the mean of the real clips, if there are any, since most models embed all music in a
    narrow cone.
    """

    name = "diversity ({})"

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure at least 2 clips."""
        if len(clips) < 2:
            raise UnmetNeed(f"{clips.name}: diversity needs at least 2 clips, got {len(clips)}")
        rows = self._clip_rows(clips)
        if real is not None:
            rows = rows - self._clip_rows(real).mean(axis=0)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
        cosines = unit @ unit.T

        def distance(drawn: np.ndarray) -> float:
            weights = np.bincount(drawn, minlength=len(rows)).astype(float)
            pairs = weights.sum() ** 2 - (weights**2).sum()
            same = (weights**2 * cosines.diagonal()).sum()
            return 1.0 - float((weights @ cosines @ weights - same) / pairs) if pairs else 0.0

        name, note = f"{self.name} / {clips.name}", self.extractor.note(len(clips))
        return [MetricValue.measured(name, distance, len(rows), None, note)]

    def _clip_rows(self, clips: ClipSet) -> np.ndarray:
        """Return the mean embedding of every clip, `[n, d]` float64."""
        return np.stack(
            [self.extractor.embeddings(part).double().mean(dim=0).numpy() for part in clips.of(self.extractor)]
        )
