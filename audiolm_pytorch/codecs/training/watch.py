"""A watch over a codec's training, so that nobody waits for days for what is noise."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from beartype import beartype

from audiolm_pytorch.codecs.training.reference import (
    COLLAPSED,
    COMMITMENT_FACTOR,
    MEL_FACTOR,
    NOTHING_LEARNT,
    SKIPPED_SHARE,
    STILL_LEARNING,
    STUCK,
    USAGE_FACTOR,
    Curves,
    RowReader,
    packaged_reference,
)

__all__ = ["CurveWatch"]

logger = logging.getLogger(__name__)

_cached_reference = lru_cache(maxsize=1)(packaged_reference)


class CurveWatch:
    """Says in the log, once for each kind of trouble, when a codec's training leaves the range of a healthy one.

    Called with each row of metrics as it is written (`TrainLoop(watch=...)`), or with those of a file. A warning tells
    what was seen, what the reference showed at that point, and what to try. Two rows in a row must be out of range.
    The packaged reference was trained without discriminators; theirs are judged by fixed limits.

    Args:
        num_train_steps: Length of the run.
        reference: What to compare with; the packaged reference if not given.
    """

    @beartype
    def __init__(self, num_train_steps: int, reference: Curves | None = None) -> None:
        self.num_train_steps = num_train_steps
        self.reference = _cached_reference() if reference is None else reference
        self.warnings: dict[str, str] = {}
        self._reader = RowReader()
        self._suspected: set[str] = set()
        self._seen: dict[str, int] = {}
        self._judged_from: int | None = None
        self._mel_before = float("inf")

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Look at one row of metrics."""
        step, phase = int(row["step"]), str(row["phase"])
        if step <= self._seen.get(phase, -1):
            return  # a run that went back to its checkpoint
        self._seen[phase] = step
        figures = self._reader(row)
        for name, value in figures.items():
            if name == "valid_mel":
                self._check_mel(step, value)
            elif name in ("usage_level_1", "usage_lowest"):
                self._check_usage(name, step, value)
            elif name == "commitment":
                self._check_commitment(step, value)
            elif name == "discriminator":
                self._check_discriminator(step, value)
        if "skipped" in row:
            self._check_skipped(step, int(row["skipped"]))

    def _expected(self, name: str, step: int) -> list[float]:
        """What the reference showed up to the place that a step is compared with."""
        return self.reference.around(name, min(step, step / self.num_train_steps * self.reference.num_train_steps))

    def _is_settling(self, step: int) -> bool:
        """Whether the codes have just come into use: distance and usage jump then, in a healthy run as well."""
        codes_from = self._reader.codes_from
        return codes_from is not None and step < 2 * codes_from

    def _check_mel(self, step: int, value: float) -> None:
        # the reference has rows of training at more steps than of validation
        expected = self._expected("valid_mel", step) or self._expected("train_mel", step)
        if not expected or self._is_settling(step):
            return
        before, self._mel_before = self._mel_before, value
        usual = MEL_FACTOR * max(expected)
        if step >= max(100, min(self.num_train_steps / 4, 5000)):
            usual = min(usual, NOTHING_LEARNT)
        self._judge(
            _Finding("mel distance", "valid_mel", step, value > max(usual, STILL_LEARNING * before)),
            f"the mel distance in validation is {value:.2f} times that of the average spectrum of the same audio",
            f"{expected[-1]:.2f} at this point, and up to {usual:.2f} is usual",
            "a learning rate 3 to 10 times lower, listen to samples/, and see that nothing of the codec is frozen and "
            "that the audio is what it should be",
        )

    def _check_usage(self, name: str, step: int, value: float) -> None:
        # before the reference's first validation with codes, that one stands for all
        expected = self._expected(name, step) or [value for _, value in self.reference.points.get(name, [])[:1]]
        if not expected or self._is_settling(step):
            return
        usual = USAGE_FACTOR * min(expected)
        level = "level 1" if name == "usage_level_1" else "the least used level"
        self._judge(
            _Finding("unused codes", name, step, value < usual),
            f"{level} uses {value:.1%} of the codes that so much audio should use",
            f"{expected[-1]:.0%} at this point, and no less than {usual:.0%} is usual",
            "more unquantized_steps before the codebooks start, a higher dead_below_share, or a smaller codebook",
        )

    def _check_commitment(self, step: int, value: float) -> None:
        expected = self._expected("commitment", step) or [1.0]
        usual = COMMITMENT_FACTOR * max(1.0, *expected)
        self._judge(
            _Finding("commitment", "commitment", step, value > usual),
            f"the commitment loss is {value:.3g} times its first value: the encoder runs away from its codebooks",
            f"{expected[-1]:.2g} times at this point, and up to {usual:.3g} is usual",
            "a larger commitment weight, or a lower learning rate",
        )

    def _check_discriminator(self, step: int, value: float) -> None:
        self._judged_from = step if self._judged_from is None else self._judged_from
        expected = self._expected("discriminator", step)
        healthy = f"{expected[-1]:.2f} at this point" if expected else "values between 0.5 and 1.95"
        # in their first steps they know nothing yet
        is_early = step - self._judged_from < max(100, self.num_train_steps // 50)
        self._judge(
            _Finding("discriminators know nothing", "stuck", step, value > STUCK and not is_early),
            f"the hinge loss of the discriminators is {value:.3f}: they tell nothing apart and teach nothing",
            healthy,
            "a higher learning rate or wider discriminators, and see that their parameters move",
        )
        self._judge(
            _Finding("discriminators know everything", "collapsed", step, value < COLLAPSED),
            f"the hinge loss of the discriminators is {value:.3f}: the codec never deceives them and learns nothing",
            healthy,
            "a later adversarial_start_step, a lower learning rate, or narrower discriminators",
        )

    def _check_skipped(self, step: int, skipped: int) -> None:
        self._judge(
            _Finding("skipped steps", "skipped", step, skipped > max(2.0, SKIPPED_SHARE * step)),
            f"{skipped} steps were skipped, since losses or gradients were not finite",
            "none",
            "a lower learning rate, and look at the items that the log names",
        )

    def _judge(self, finding: "_Finding", seen: str, healthy: str, advice: str) -> None:
        """Warn at the second row in a row that is out of range."""
        if not finding.is_out:
            self._suspected.discard(finding.figure)
        elif finding.figure not in self._suspected:
            self._suspected.add(finding.figure)
        elif finding.kind not in self.warnings:
            self.warnings[finding.kind] = (
                f"codec training, step {finding.step} of {self.num_train_steps}: {seen}. The reference run showed "
                f"{healthy}. Try {advice}"
            )
            logger.warning(self.warnings[finding.kind])


@dataclass(frozen=True)
class _Finding:
    """Whether a figure is out of range at a step; of several figures of one kind one is told of."""

    kind: str
    figure: str
    step: int
    is_out: bool
