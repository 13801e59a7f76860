"""How far a figure can be trusted: intervals by resampling."""

from collections.abc import Callable

import numpy as np
from beartype import beartype

__all__ = ["BOOTSTRAP_ROUNDS", "bootstrap_interval"]

BOOTSTRAP_ROUNDS = 1000


@beartype
def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], count: int, rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap over items (Efron & Tibshirani, An Introduction to the Bootstrap, sec. 13.3).

    Args:
        statistic: From indices of items (with repetitions) to the number.
        count: Items there are.
        rounds: Resamples.
        seed: The same seed gives the same interval.

    Returns:
        The 2.5% and 97.5% points of the resampled statistic.

    Raises:
        ValueError: If there are no items.
    """
    if count < 1:
        raise ValueError("an interval needs at least one item, got none")
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(count, size=count)) for _ in range(rounds)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
