"""Learning rate as a pure function of the step: nothing to checkpoint, nothing to drift."""

import math

from beartype import beartype

__all__ = ["learning_rate_at"]


@beartype
def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, num_train_steps: int, final_fraction: float = 0.0
) -> float:
    """Linear warm-up, then half a cosine down to a fraction of the peak.

    The cosine is that of SGDR without restarts (arXiv:1608.03983, eq. 5).

    Args:
        step: Which step, counted from 0; from `num_train_steps` on the last value stays.
        peak: Highest learning rate, reached after the warm-up.
        warmup_steps: Steps of the ramp; step 0 has `peak / warmup_steps`, not 0, so that no step is idle.
        num_train_steps: Length of the run in steps.
        final_fraction: Learning rate of the last step, as a fraction of the peak.

    Returns:
        The learning rate of the step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    last_step = max(num_train_steps - 1, warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (last_step - warmup_steps))
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress)))
