"""Scores of probes: right answers clip by clip, so that intervals and differences resample whole clips."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from beartype import beartype
from torch import Tensor

from musiclm_pytorch.evaluation.report import Metric

__all__ = ["FRONT_END", "LOG_MEL", "OWN_TOKENS", "Reading", "Score", "layer_name"]

LOG_MEL, FRONT_END, OWN_TOKENS = "log-mel", "front end", "own tokens"


def layer_name(layer: int) -> str:
    """How the view of a layer is called."""
    return f"layer {layer}"


class Reading(str, Enum):
    """How features are read."""

    LINEAR = "linear probe"
    TOKEN = "token"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Score:
    """How often one probe is right.

    Attributes:
        view: What it reads: `log-mel`, `front end`, `layer N` or `own tokens`.
        reading: How.
        probe: What it names: pitch class, onset, digit, speaker, instrument.
        clusters: Of the tokens that it reads; None for a linear probe.
        right: `[clips, classes]` right answers of each clip by true class.
        total: `[clips, classes]` questions.
        balanced: Whether classes count alike, however rare.
    """

    view: str
    reading: Reading
    probe: str
    clusters: int | None
    right: np.ndarray
    total: np.ndarray
    balanced: bool = False

    @classmethod
    @beartype
    def of(
        cls,
        view: str,
        reading: Reading,
        probe: str,
        clusters: int | None,
        truth: Tensor,
        answers: Tensor,
        clip_index: Tensor,
        num_clips: int,
        balanced: bool = False,
    ) -> "Score":
        """Count right answers.

        Args:
            view: What was read.
            reading: How.
            probe: What was named.
            clusters: Of the tokens.
            truth: `[m]` int64.
            answers: `[m]` int64.
            clip_index: `[m]` int64, the clip of each question.
            num_clips: Clips.
            balanced: Weigh classes alike.

        Returns:
            The score.

        Raises:
            ValueError: If nothing was asked.
        """
        if not len(truth):
            raise ValueError(f"there is no test frame with a {probe}; take more clips")
        counts = np.zeros((2, num_clips, int(truth.max()) + 1))
        where = (clip_index.numpy(), truth.numpy())
        np.add.at(counts[0], where, (truth == answers).numpy())
        np.add.at(counts[1], where, 1)
        return cls(view, reading, probe, clusters, counts[0], counts[1], balanced)

    @property
    def name(self) -> str:
        """As it is called in reports."""
        reading = self.reading.value if self.clusters is None else f"{self.reading.value}, k {self.clusters}"
        return f"{self.view} / {reading} / {self.probe}{' (balanced)' if self.balanced else ''}"

    @property
    def key(self) -> tuple[Reading, str, int | None]:
        """Equal for scores that can be compared across views."""
        return (self.reading, self.probe, self.clusters)

    @property
    def value(self) -> float:
        """Share of right answers, 0..1."""
        return self._share(np.arange(len(self.total)))

    @property
    def chance(self) -> float:
        """What always naming the commonest class of the test gives; one over the classes where these count alike."""
        totals = self.total.sum(axis=0)
        return float(1 / np.count_nonzero(totals) if self.balanced else totals.max() / totals.sum())

    def metric(self) -> Metric:
        """The share with its interval."""
        note = f"{int(self.total.sum())} questions"
        return Metric.measured(self.name, self._share, len(self.total), chance=self.chance, note=note)

    def gain_over(self, other: "Score") -> Metric:
        """What this view has over another in the same probe on the same clips, with the interval of the difference."""
        if self.key != other.key or not np.array_equal(self.total, other.total):
            raise ValueError(f"{self.name} and {other.name} cannot be compared: they did not answer the same questions")
        view = f"{self.view} less {other.view}"
        name = self.name.replace(self.view, view, 1)
        return Metric.measured(name, lambda chosen: self._share(chosen) - other._share(chosen), len(self.total))

    def _share(self, chosen: np.ndarray) -> float:
        """Share of right answers in some clips; a resample without any question counts as wrong throughout."""
        times = np.bincount(chosen, minlength=len(self.total)).astype(float)
        right, total = times @ self.right, times @ self.total
        if not self.balanced:
            return float(right.sum() / max(total.sum(), 1.0))
        occurs = total > 0
        return float((right[occurs] / total[occurs]).mean()) if occurs.any() else 0.0
