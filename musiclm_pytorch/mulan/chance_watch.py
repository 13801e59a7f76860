"""Warning if the loss of contrastive training does not fall below the loss of a model that guesses."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from audiolm_pytorch.saving.text import logger_named

__all__ = ["ChanceWatch"]

logger = logger_named(__name__)

_STUCK_SHARE = 0.98
# Steps after the warm-up before the first comparison, and over which the loss is averaged.
_WINDOW_STEPS = 100


class ChanceWatch:
    """Logs one warning if the mean loss of the last 100 training steps is at least 98% of the chance loss.

    Pass a `ChanceWatch` to `TrainLoop` as `on_row`. The first check is 100 steps after the learning-rate warm-up.
    """

    def __init__(self, warmup_steps: int, phase: str) -> None:
        self.phase = phase
        self.warning: str | None = None
        self._first_step = warmup_steps + _WINDOW_STEPS
        self._step = 0
        self._rows: deque[tuple[int, int, float]] = deque()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Compare `loss` in a row of training metrics with `chance`, the chance loss, if the row contains both."""
        loss, chance, step = row.get("loss"), row.get("chance"), int(row["step"])
        if row["phase"] != self.phase or loss is None or chance is None or step <= self._step:
            return
        # A row has the mean of the steps since the row before it.
        self._rows.append((step, step - self._step, float(loss)))
        self._step = step
        while self._rows[0][0] <= step - _WINDOW_STEPS:
            self._rows.popleft()
        num_steps = sum(count for _, count, _ in self._rows)
        mean = sum(count * row_loss for _, count, row_loss in self._rows) / num_steps
        # NaN is not smaller than anything, so that it warns too.
        if step < self._first_step or self.warning is not None or mean < _STUCK_SHARE * chance:
            return
        self.warning = (
            f"{self.phase} training, step {step}: the mean loss of the last {num_steps} steps is {mean:.3f}, and the "
            f"chance loss is {chance:.3f}. Check that batches have two clips or more with different captions, "
            "that files are not silent and match their captions, and that both towers are trained; try another "
            "learning rate, a longer warm-up or larger batches"
        )
        logger.warning(self.warning)
