"""Half precision in training: autocast, and the scale of the loss for float16."""

from dataclasses import dataclass

import torch

from audiolm_pytorch.checks.types import typed

__all__ = ["LossScale", "autocast"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_SCALE = 2.0**24


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return a context in which losses are computed in the precision "fp32", "bf16" or "fp16"."""
    dtype = _HALF.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@typed
@dataclass
class LossScale:
    """Factor of the loss that keeps small float16 gradients above zero (arXiv:1710.03740, section 3.2).

    As `torch.amp.GradScaler`, it halves after every overflow, and doubles after `growth_steps` steps without one. That
    class cannot be used, because it cannot check sharded gradients and gradients of scalars together.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    growth_steps: int = 2000

    def update(self, is_finite: bool) -> None:
        """Update the scale after a step; `is_finite` is whether the step had finite gradients."""
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps == self.growth_steps:
            self.scale, self.good_steps = min(_MAX_SCALE, self.scale * 2), 0
