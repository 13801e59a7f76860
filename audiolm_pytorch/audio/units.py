"""Conversion between seconds, samples and frames."""

from fractions import Fraction
from math import ceil, inf

from audiolm_pytorch.checks.types import typed

__all__ = ["check_durations", "exact_div", "frames_covering", "frames_inside", "samples_covering", "samples_in"]

# The rounding error of seconds as a float is about 1e-8 samples in an hour of audio; a larger difference is real.
TOLERANCE_SAMPLES = 1e-6


def _check(amount: float, name_of_amount: str, **divisors: int) -> None:
    """Check that `amount` is finite and not negative, and that every number in `divisors` is at least 1."""
    if not 0 <= amount < inf:
        raise ValueError(f"{name_of_amount} must be finite and not negative, got {amount}")
    for name, value in divisors.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_durations(**seconds: float | None) -> None:
    """Check that every duration is positive and finite; None is allowed. The ValueError names the argument."""
    for name, value in seconds.items():
        if value is not None and not 0 < value < inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


@typed
def exact_div(a: int, b: int, what: str) -> int:
    """Return `a / b`; if there is a remainder, raise a ValueError that contains `what`, the name of `a`."""
    _check(0, what, divisor=b)
    if a % b:
        raise ValueError(
            f"{what}: {a} is not a multiple of {b}; the nearest multiples are {a - a % b} and {a - a % b + b}"
        )
    return a // b


@typed
def samples_in(seconds: float | Fraction, sample_hz: int) -> int:
    """Return the number of samples in a duration; raise a ValueError if it is not a whole number (within 1e-6)."""
    _check(float(seconds), "seconds", sample_hz=sample_hz)
    exact_samples = Fraction(seconds) * sample_hz
    num_samples = round(exact_samples)
    if abs(exact_samples - num_samples) > TOLERANCE_SAMPLES:
        raise ValueError(
            f"{float(seconds)} s at {sample_hz} Hz is {float(exact_samples)} samples, "
            f"not a whole number; use e.g. {num_samples}/{sample_hz} s, or round up with samples_covering"
        )
    return num_samples


@typed
def samples_covering(seconds: float | Fraction, multiple_samples: int, sample_hz: int) -> int:
    """Return the smallest number of samples that covers a duration and is a multiple of `multiple_samples`."""
    _check(float(seconds), "seconds", multiple_samples=multiple_samples, sample_hz=sample_hz)
    exact_samples = Fraction(seconds) * sample_hz
    nearest = round(exact_samples)
    # Without rounding to whole samples, 0.1 s + 0.2 s as floats would need one more frame.
    whole_samples = nearest if abs(exact_samples - nearest) <= TOLERANCE_SAMPLES else ceil(exact_samples)
    return frames_covering(whole_samples, multiple_samples) * multiple_samples


@typed
def frames_covering(num_samples: int, samples_per_frame: int) -> int:
    """Number of frames that cover `num_samples` samples, rounded up."""
    _check(num_samples, "num_samples", samples_per_frame=samples_per_frame)
    return -(-num_samples // samples_per_frame)


@typed
def frames_inside(seconds: float | Fraction, rate_hz: int | Fraction) -> int:
    """Number of whole frames in a duration; the last frame counts as whole if at most 1e-6 of it is missing."""
    return int(seconds * rate_hz + Fraction(1, 10**6))
