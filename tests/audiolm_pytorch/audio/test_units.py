"""Conversions between seconds, samples and frames are exact or an error."""

from fractions import Fraction
from math import ceil, inf, nan

import pytest

from audiolm_pytorch.audio.units import (
    exact_div,
    frames_covering,
    frames_inside,
    samples_covering,
    samples_in,
)


@pytest.mark.parametrize("hz", [8000, 16000, 22050, 24000, 44100, 48000])
def test_every_whole_number_of_samples_survives_the_way_through_seconds(hz: int) -> None:
    """Guards against off-by-one lengths from floats of seconds, up to an hour of audio."""
    for num_samples in [0, 1, 2, 3, 7, 1023, 320 * 32, hz - 1, hz, 10 * hz + 1, 3600 * hz - 1]:
        assert samples_in(num_samples / hz, hz) == num_samples
        assert samples_in(Fraction(num_samples, hz), hz) == num_samples


def test_a_fraction_of_a_sample_is_refused_with_advice() -> None:
    """Guards against silently rounding a duration that does not end on a sample."""
    with pytest.raises(ValueError, match=r"0\.33.* s at 16000 Hz .*samples_covering"):
        samples_in(1 / 3, 16000)
    assert samples_in(Fraction(1, 3), 24000) == 8000


@pytest.mark.parametrize(("hz", "frame"), [(16000, 320), (16000, 640), (24000, 320), (24000, 960), (44100, 512)])
def test_covering_is_the_smallest_multiple_that_is_long_enough(hz: int, frame: int) -> None:
    """Guards the rounding of requests: never short, never a whole frame too long."""
    for millis in range(0, 3000, 37):
        covering = samples_covering(millis / 1000, frame, hz)
        assert covering == ceil(Fraction(millis * hz, 1000 * frame)) * frame


def test_covering_forgives_the_error_of_floats() -> None:
    """Guards against one frame too many when 0.1 + 0.2 is not 0.3."""
    assert samples_covering(0.1 + 0.2, 480, 16000) == samples_covering(0.3, 480, 16000) == 4800


def test_frames_cover_a_length_or_lie_inside_a_duration() -> None:
    """Guards both counts of frames against each other."""
    assert frames_covering(3200, 320) == 10
    assert frames_covering(3201, 320) == 11
    assert frames_covering(0, 320) == 0
    assert frames_inside(0.99, 50) == 49 and frames_inside(0.3, 50) == frames_inside(0.1 + 0.1 + 0.1, 50) == 15


def test_exact_division_names_the_quantity_and_its_neighbours() -> None:
    """Guards the message, which proposes valid lengths."""
    assert exact_div(12, 4, "tokens") == 3
    with pytest.raises(ValueError, match="tokens: 13 is not a multiple of 4; .* 12 and 16"):
        exact_div(13, 4, "tokens")


@pytest.mark.parametrize("seconds", [-1.0, inf, nan])
def test_impossible_durations_are_refused(seconds: float) -> None:
    """Guards against negative, endless and undefined durations."""
    with pytest.raises(ValueError, match="seconds must be finite and not negative|seconds must be a number, got NaN"):
        samples_in(seconds, 16000)


def test_rates_and_frames_below_one_are_refused() -> None:
    """Guards against division by zero with a nameless error."""
    with pytest.raises(ValueError, match="sample_hz must be at least 1"):
        samples_in(1.0, 0)
    with pytest.raises(ValueError, match="samples_per_frame must be at least 1"):
        frames_covering(10, 0)
