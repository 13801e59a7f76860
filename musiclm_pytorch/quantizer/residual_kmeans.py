"""Codebooks of residual quantization by k-means."""

import warnings

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.kmeans import (
    ArrayVectors,
    cluster_epoch,
    first_centroids,
    mini_batch_size,
    nearest_centroid,
    start_size,
)

__all__ = ["residual_codes", "residual_kmeans"]

# Points times codes up to which Lloyd's algorithm sees all points at every step. Beyond, mini-batches are faster and as
# good (error on new points within 1%): 12 levels of 1024 codes for 200,000 points take 85 s on one core.
_MAX_LLOYD_DISTANCES = 2**24
_MIN_EPOCHS, _MIN_BATCHES = 4, 200


@typed
def residual_kmeans(points: Tensor, num_levels: int, codebook_size: int, seed: int = 0) -> Tensor:
    """Fit codebooks `[num_levels, codebook_size, d]` float32 by k-means of points and of the residuals of each level.

    `points` are `[n, d]` float32 on the CPU, with n at least `codebook_size`. A codebook contains equal centroids if
    the points have fewer than `codebook_size` different values.
    """
    cluster = _lloyd if len(points) * codebook_size <= _MAX_LLOYD_DISTANCES else _mini_batches
    residual, codebooks = points, []
    for level in range(num_levels):
        codebooks.append(torch.from_numpy(cluster(residual.numpy(), codebook_size, seed + level)))
        residual = residual - codebooks[-1][nearest_centroid(residual, codebooks[-1])]
    return torch.stack(codebooks)


@torch.no_grad()
def residual_codes(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """Quantize vectors `[..., d]` with codebooks `[q, k, d]` to codes `[..., q]` int64.

    At each level, the code is the index of the centroid that is nearest to the residual of the previous levels.
    """
    with torch.autocast(device_type=vectors.device.type, enabled=False):
        residual, codes = vectors.reshape(-1, vectors.shape[-1]), []
        for codebook in codebooks.float():
            codes.append(nearest_centroid(residual, codebook))
            residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=-1).view(*vectors.shape[:-1], len(codebooks))


def _lloyd(points: np.ndarray, codebook_size: int, seed: int) -> np.ndarray:
    """Compute k-means centroids `[codebook_size, d]` by Lloyd's algorithm."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with warnings.catch_warnings(), threadpool_limits(limits=1):  # one thread adds in one order
        warnings.simplefilter("ignore", ConvergenceWarning)  # raised if fewer points than codes are distinct
        kmeans = KMeans(codebook_size, n_init=1, random_state=seed).fit(points)
    return np.asarray(kmeans.cluster_centers_, dtype=np.float32)


def _mini_batches(points: np.ndarray, codebook_size: int, seed: int) -> np.ndarray:
    """Compute k-means centroids `[codebook_size, d]` by epochs of mini-batch k-means."""
    num_start = start_size(len(points), codebook_size)
    start = np.random.default_rng([seed, 0]).choice(len(points), num_start, replace=False)
    centroids = first_centroids(points[start], codebook_size, seed)
    num_batches = -(-len(points) // mini_batch_size(codebook_size))
    for epoch in range(max(_MIN_EPOCHS, -(-_MIN_BATCHES // num_batches))):
        centroids = cluster_epoch(ArrayVectors(points), centroids, (seed, 1, epoch))
    return centroids
