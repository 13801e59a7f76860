"""Fréchet distance between Gaussians that are fitted to embeddings (FAD, arXiv:1812.08466)."""

import numpy as np

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.metric import ClipSet, UnmetNeed
from musiclm_pytorch.evaluation.metrics.set_distance import SetDistance, WeightedDistance

__all__ = ["FrechetDistance", "gaussian_frechet_distance"]


@typed
def gaussian_frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Compute |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of Gaussians with covariances A and B, in float64.

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which are real.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        np.asarray(part, dtype=np.float64) for part in (mean_a, covariance_a, mean_b, covariance_b)
    )
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    return max(float(((mean_a - mean_b) ** 2).sum() + trace), 0.0)


class FrechetDistance(SetDistance):
    """Fréchet distance; it is biased upwards if a set has few windows, so compare sets of equal size."""

    name = "Fréchet distance ({})"

    def weighted_distance(self, clips: ClipSet, real: ClipSet) -> WeightedDistance:
        """Fit weighted Gaussians to the windows of both sets."""
        sides = [part.embeddings(self.extractor) for part in (clips, real)]
        for part, (rows, _) in zip((clips, real), sides):
            if len(rows) < 2:
                raise UnmetNeed(f"{part.name}: a covariance needs at least 2 windows, got {len(rows)}; pass more clips")

        def distance(clip_weights: np.ndarray, real_weights: np.ndarray) -> float:
            (mean_a, covariance_a), (mean_b, covariance_b) = (
                _gaussian(rows, weights[index]) for (rows, index), weights in zip(sides, (clip_weights, real_weights))
            )
            return gaussian_frechet_distance(mean_a, covariance_a, mean_b, covariance_b)

        return distance


def _gaussian(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean `[d]` and the unbiased covariance `[d, d]` of rows `[w, d]` with weights (repetitions)."""
    total = weights.sum()
    mean = weights @ rows / total
    centred = rows - mean
    return mean, (centred * weights[:, None]).T @ centred / max(total - 1, 1)
