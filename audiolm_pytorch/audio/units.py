"""The one place that converts between seconds, samples and frames: exact, or a ValueError."""

from fractions import Fraction
from math import ceil, inf

from beartype import beartype

__all__ = ["convert_samples", "exact_div", "frames_covering", "frames_in", "samples_covering", "samples_in"]

# A float of seconds times a rate is off by about 1e-8 samples in an hour of audio; more than this is a real remainder.
TOLERANCE_SAMPLES = 1e-6


def _check(amount: float, name_of_amount: str, **divisors: int) -> None:
    """Refuse amounts that are negative or not finite, and rates or frame sizes below one."""
    if not 0 <= amount < inf:
        raise ValueError(f"{name_of_amount} must be finite and not negative, got {amount}")
    for name, value in divisors.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@beartype
def exact_div(a: int, b: int, what: str) -> int:
    """Divide two whole numbers that must divide without a remainder.

    Args:
        a: Dividend.
        b: Divisor, at least 1.
        what: Names the quantity in the error message.

    Returns:
        `a // b`.

    Raises:
        ValueError: If `b` does not divide `a`.
    """
    _check(0, what, divisor=b)
    if a % b:
        raise ValueError(
            f"{what}: {a} is not a multiple of {b} (remainder {a % b}); nearest are {a - a % b}, {a - a % b + b}"
        )
    return a // b


@beartype
def samples_in(seconds: float | int | Fraction, sample_hz: int) -> int:
    """Count the samples of a duration that must be a whole number of samples.

    Args:
        seconds: Duration in seconds, not negative.
        sample_hz: Sample rate in samples a second.

    Returns:
        `seconds * sample_hz`, exact to 1e-6 samples.

    Raises:
        ValueError: If the duration does not end on a sample.
    """
    _check(float(seconds), "seconds", sample_hz=sample_hz)
    exact_samples = Fraction(seconds) * sample_hz
    num_samples = round(exact_samples)
    if abs(exact_samples - num_samples) > TOLERANCE_SAMPLES:
        raise ValueError(
            f"{float(seconds)} s at {sample_hz} Hz is {float(exact_samples)} samples, not a whole number; "
            f"give e.g. {num_samples}/{sample_hz} s, or round up with samples_covering"
        )
    return num_samples


@beartype
def samples_covering(seconds: float | int | Fraction, multiple_samples: int, sample_hz: int) -> int:
    """Count the samples of the fewest whole frames that cover a duration.

    Args:
        seconds: Requested duration in seconds, not negative.
        multiple_samples: Samples a frame.
        sample_hz: Sample rate in samples a second.

    Returns:
        The smallest multiple of `multiple_samples` that is not shorter than `seconds`.
    """
    _check(float(seconds), "seconds", multiple_samples=multiple_samples, sample_hz=sample_hz)
    exact_samples = Fraction(seconds) * sample_hz
    nearest = round(exact_samples)
    # Without the snap, 0.1 s + 0.2 s of floats would ask for one frame too many.
    whole_samples = nearest if abs(exact_samples - nearest) <= TOLERANCE_SAMPLES else ceil(exact_samples)
    return frames_covering(whole_samples, multiple_samples) * multiple_samples


@beartype
def frames_in(num_samples: int, samples_per_frame: int) -> int:
    """Count the frames of a length that must be a whole number of frames.

    Args:
        num_samples: Length in samples, not negative.
        samples_per_frame: Samples a frame.

    Returns:
        `num_samples / samples_per_frame`.

    Raises:
        ValueError: If the length does not end on a frame.
    """
    _check(num_samples, "num_samples", samples_per_frame=samples_per_frame)
    return exact_div(num_samples, samples_per_frame, "samples in whole frames")


@beartype
def frames_covering(num_samples: int, samples_per_frame: int) -> int:
    """Count the fewest whole frames that cover a length.

    Args:
        num_samples: Length in samples, not negative.
        samples_per_frame: Samples a frame.

    Returns:
        `ceil(num_samples / samples_per_frame)`.
    """
    _check(num_samples, "num_samples", samples_per_frame=samples_per_frame)
    return -(-num_samples // samples_per_frame)


@beartype
def frames_inside(seconds: float | int | Fraction, rate_hz: int | Fraction) -> int:
    """Count the whole frames that a stretch holds; a float that falls short of the next by 1e-6 frames holds it.

    Args:
        seconds: Length of the stretch.
        rate_hz: Frames per second.

    Returns:
        `floor(seconds * rate_hz)`.
    """
    return int(seconds * rate_hz + Fraction(1, 10**6))


@beartype
def convert_samples(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Say how many samples the same duration has at another rate, when that is a whole number.

    Args:
        num_samples: Length in samples at `from_hz`, not negative.
        from_hz: The rate that the length is given in.
        to_hz: The rate that it is wanted in.

    Returns:
        `num_samples * to_hz / from_hz`.

    Raises:
        ValueError: If that is not a whole number.
    """
    _check(num_samples, "num_samples", from_hz=from_hz, to_hz=to_hz)
    return exact_div(num_samples * to_hz, from_hz, f"{num_samples} samples at {from_hz} Hz as samples at {to_hz} Hz")
