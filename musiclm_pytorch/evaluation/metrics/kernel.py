"""Kernel distance: the unbiased maximum mean discrepancy of embeddings (KAD, arXiv:2502.15602)."""

import numpy as np

from musiclm_pytorch.evaluation.metric import ClipSet, UnmetNeed
from musiclm_pytorch.evaluation.metrics.set_distance import SetDistance, WeightedDistance

__all__ = ["KernelDistance"]


class KernelDistance(SetDistance):
    """Unbiased estimate of MMD^2 (Gretton et al. 2012, eq. 3); it can be negative and does not depend on the set sizes.

    The kernel is exp(-|x - y|^2 / (2 s^2)); s is the median distance between windows of different real clips. Pairs of
    windows of the same clip are left out.
    """

    name = "kernel distance ({})"

    def weighted_distance(self, clips: ClipSet, real: ClipSet) -> WeightedDistance:
        """Compute the kernels of all pairs of clips once."""
        (rows_a, index_a), (rows_b, index_b) = (part.embeddings(self.extractor) for part in (clips, real))
        if min(len(clips), len(real)) < 2:
            raise UnmetNeed(f"the kernel distance needs at least 2 clips in each set, got {len(clips)} and {len(real)}")
        distances = _squared_distances(rows_b, rows_b)
        # Equal real clips would have no scale.
        scale = float(np.median(distances[index_b[:, None] != index_b])) or 1.0
        within_a, within_b, between = (
            _clip_sums(np.exp(-squared / (2 * scale)), left, right, shape)
            for squared, left, right, shape in (
                (_squared_distances(rows_a, rows_a), index_a, index_a, (len(clips), len(clips))),
                (distances, index_b, index_b, (len(real), len(real))),
                (_squared_distances(rows_a, rows_b), index_a, index_b, (len(clips), len(real))),
            )
        )
        np.fill_diagonal(within_a, 0.0)
        np.fill_diagonal(within_b, 0.0)
        num_a, num_b = np.bincount(index_a).astype(float), np.bincount(index_b).astype(float)

        def distance(weights_a: np.ndarray, weights_b: np.ndarray) -> float:
            windows_a, windows_b = weights_a * num_a, weights_b * num_b
            pairs_a, pairs_b = (side.sum() ** 2 - (side**2).sum() for side in (windows_a, windows_b))
            if not pairs_a or not pairs_b:  # a draw with a single different clip
                return float("nan")
            inside = weights_a @ within_a @ weights_a / pairs_a + weights_b @ within_b @ weights_b / pairs_b
            return float(inside - 2 * weights_a @ between @ weights_b / (windows_a.sum() * windows_b.sum()))

        return distance


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances `[m, k]` of rows `[m, d]` and `[k, d]`."""
    return ((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T).clip(min=0)


def _clip_sums(values: np.ndarray, left: np.ndarray, right: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Sum a matrix over the windows of each pair of clips, `[m, k]` to `shape`."""
    left_starts, right_starts = (np.searchsorted(index, np.arange(size)) for index, size in zip((left, right), shape))
    return np.add.reduceat(np.add.reduceat(values, left_starts, axis=0), right_starts, axis=1)
