"""Base class of distances between generated and real clips, with intervals and the distance of two real halves."""

from abc import abstractmethod
from collections.abc import Callable

import numpy as np

from musiclm_pytorch.evaluation.metric import ClipSet, Metric, UnmetNeed, require_real
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["SetDistance", "WeightedDistance", "distance_interval"]

_BOOTSTRAP_ROUNDS = 200
_FLOOR_SPLITS = 20

# From the weights of the clips of both sets, `[n]` and `[m]`, to their distance.
WeightedDistance = Callable[[np.ndarray, np.ndarray], float]


def distance_interval(distance: WeightedDistance, sizes: tuple[int, int]) -> tuple[float, float, float]:
    """Compute a distance of two sets of clips with these numbers of clips, and the ends of its 95% interval.

    The interval is a bootstrap over the clips of both sets. A set drawn with repetition is less varied than the
    original set, which increases every distance; so the interval is moved by the mean of this increase.
    """
    value = distance(*(np.ones(size) for size in sizes))
    rng = np.random.default_rng(0)
    rounds = [
        distance(*(np.bincount(rng.integers(size, size=size), minlength=size).astype(float) for size in sizes))
        for _ in range(_BOOTSTRAP_ROUNDS if min(sizes) > 2 else 0)
    ]
    drawn = np.array([number for number in rounds if np.isfinite(number)] or [value])
    low, high = np.quantile(drawn, [0.025, 0.975]) - drawn.mean() + value
    return value, float(low), float(high)


class SetDistance(Metric):
    """Distance between the embeddings of two sets of clips, with the interval of `distance_interval`."""

    @abstractmethod
    def weighted_distance(self, clips: ClipSet, real: ClipSet) -> WeightedDistance:
        """Return a function that computes the distance if the clips have the given weights, such as repetitions."""

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure the distance between the clips and the real clips."""
        real = require_real(real, self)
        distance = self.weighted_distance(clips, real)
        value, low, high = distance_interval(distance, (len(clips), len(real)))
        name = f"{self.name} / {clips.name}"
        return [MetricValue(name, value, low, high, None, len(clips), self._note(clips, real))]

    def floor(self, real: ClipSet, training: ClipSet | None) -> list[MetricValue]:
        """Measure the distance between random halves of the real clips: mean and 95% of 20 divisions."""
        if len(real) < 4:
            raise UnmetNeed(f"two halves of the real clips need at least 4 clips, got {len(real)}")
        distance = self.weighted_distance(real, real)
        drawn = []
        for seed in range(_FLOOR_SPLITS):
            is_first = np.zeros(len(real))
            is_first[np.random.default_rng(seed).permutation(len(real))[: len(real) // 2]] = 1.0
            drawn.append(distance(is_first, 1.0 - is_first))
        low, high = np.quantile(drawn, [0.025, 0.975])
        name = f"{self.name} / two halves of {real.name}"
        note = self._note(real, real)
        return [MetricValue(name, float(np.mean(drawn)), float(low), float(high), None, len(real) // 2, note)]

    def _note(self, clips: ClipSet, real: ClipSet) -> str:
        num_rows = sum(len(self.extractor.embeddings(part)) for part in clips.of(self.extractor))
        return f"{self.extractor.note(num_rows)}; against {len(real)} clips"
