"""Learning rate as a pure function of the step."""

import math

from beartype import beartype

__all__ = ["learning_rate_at"]


@beartype
def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, num_train_steps: int, final_fraction: float = 0.0
) -> float:
    """Linear warm-up, then half a cosine down to a fraction of the peak (SGDR without restarts, 1608.03983, eq. 5).

    Steps count from 0. Step 0 has `peak / warmup_steps`, not 0, so that no step is idle. From the last step on the
    rate stays at `peak * final_fraction`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    last_step = max(num_train_steps - 1, warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (last_step - warmup_steps))
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress)))
