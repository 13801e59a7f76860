"""The nearest of some vectors, in one matrix product."""

import torch
from torch import Tensor

__all__ = ["nearest_index"]

# Rows of the distance matrix computed at once, fewer where there are many centroids: 32768 x 1024 float32 is 128 MiB.
_ROWS_AT_ONCE = 32768
_NUMBERS_AT_ONCE = 2**25


def nearest_index(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid in Euclidean distance, in float32 whatever autocast says.

    `|x - c|^2` less the term that all centroids share is `|c|^2 - 2 x.c`: no `cdist`, and bfloat16 would pick others.

    Args:
        points: `[m, d]`.
        centroids: `[k, d]`.

    Returns:
        `[m]` int64 in [0, k).
    """
    with torch.autocast(points.device.type, enabled=False):
        centroids = centroids.float()
        offsets, directions = centroids.square().sum(dim=-1), centroids.t()
        parts = points.float().split(min(_ROWS_AT_ONCE, max(1, _NUMBERS_AT_ONCE // len(centroids))))
        return torch.cat([torch.addmm(offsets, part, directions, alpha=-2.0).argmin(dim=-1) for part in parts])
