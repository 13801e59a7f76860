"""Codebooks of residual quantization by k-means: for a few clips exactly, for many in mini-batches."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.nn.kmeans import cluster_epoch, first_centroids, mini_batch_size, nearest_centroid

__all__ = ["residual_kmeans"]

# Points times codes up to which k-means sees all points at every step. Mini-batches come as close (within 1% of the
# error on fresh points) and are quicker beyond: 12 levels of 1024 codes of 200,000 points take 85 s of one core.
_MOST_DISTANCES = 2**24
_LEAST_EPOCHS, _LEAST_BATCHES = 4, 200
_START_POINTS_PER_CODE, _LEAST_START_POINTS = 16, 20_000
_PORTION_POINTS = 2**15


@beartype
def residual_kmeans(points: Tensor, num_levels: int, codebook_size: int, seed: int = 0) -> Tensor:
    """K-means on points, then on what each level leaves over.

    Args:
        points: `[n, d]` float32 on the CPU, n at least `codebook_size`.
        num_levels: Codebooks.
        codebook_size: Codes each. Where fewer points differ, codes repeat, which a search for the nearest survives.
        seed: Of the choice of first centroids and of the order of mini-batches.

    Returns:
        `[num_levels, codebook_size, d]` float32, a pure function of the arguments.
    """
    cluster = _kmeans if len(points) * codebook_size <= _MOST_DISTANCES else _batched_kmeans
    residual, codebooks = points, []
    for level in range(num_levels):
        codebooks.append(torch.from_numpy(cluster(residual.numpy(), codebook_size, seed + level)))
        residual = residual - codebooks[-1][nearest_centroid(residual, codebooks[-1])]
    return torch.stack(codebooks)


def _kmeans(points: np.ndarray, codebook_size: int, seed: int) -> np.ndarray:
    """Centroids `[k, d]` by Lloyd's algorithm."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with warnings.catch_warnings(), threadpool_limits(limits=1):  # the sums of one thread have one order
        # fewer distinct points than codes
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans = KMeans(codebook_size, n_init=1, random_state=seed).fit(points)
    return np.asarray(kmeans.cluster_centers_, dtype=np.float32)


def _batched_kmeans(points: np.ndarray, codebook_size: int, seed: int) -> np.ndarray:
    """Centroids `[k, d]` by epochs of mini-batches."""
    rows = _Rows(points)
    num_start = min(len(points), max(_START_POINTS_PER_CODE * codebook_size, _LEAST_START_POINTS))
    chosen = np.random.default_rng([seed, 0]).choice(len(points), num_start, replace=False)
    centroids = first_centroids(points[chosen], codebook_size, seed)
    num_batches = -(-len(points) // mini_batch_size(codebook_size))
    for epoch in range(max(_LEAST_EPOCHS, -(-_LEAST_BATCHES // num_batches))):
        centroids = cluster_epoch(rows, centroids, (seed, 1, epoch))
    return centroids


class _Rows:
    """An array as the source of vectors that mini-batch k-means reads."""

    def __init__(self, points: np.ndarray) -> None:
        self._points = points

    @property
    def num_vectors(self) -> int:
        return len(self._points)

    def portions(self, order: tuple[int, ...] | None = None) -> Iterator[np.ndarray]:
        count = len(self._points)
        rows = np.arange(count) if order is None else np.random.default_rng(order).permutation(count)
        for start in range(0, count, _PORTION_POINTS):
            yield self._points[rows[start : start + _PORTION_POINTS]]
