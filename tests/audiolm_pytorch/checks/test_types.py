"""Type checks at run time: conversions of numbers and sequences, and messages of one line."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed


@typed
def numbers(whole: int, real: float = 0.0, pair: tuple[float, float] = (0.0, 0.0), sizes: Sequence[int] = ()) -> Any:
    return whole, real, pair, sizes


@typed
def named(wave: Tensor | None = None, names: Sequence[str] = ()) -> Any:
    return wave, names


@typed
@dataclass(frozen=True)
class Settings:
    size: int

    def resized(self, size: int) -> "Settings":
        return Settings(size)


def test_numpy_numbers_whole_numbers_and_lists_pass() -> None:
    """The function receives Python's own types where the annotation needs them."""
    result = numbers(np.int64(3), 2, [1, np.float32(0.5)], [np.int32(4), np.int32(5)])
    assert result == (3, 2, (1, 0.5), [4, 5])
    assert [type(value) for value in (result[0], result[2], result[3][0])] == [int, tuple, int]
    assert numbers(True, np.float32(0.5))[1] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numbers(1.5), r"^numbers: whole must be int, got 1\.5 \(float\)$"),
        (lambda: numbers(np.float32(1)), r"^numbers: whole must be int, got 1\.0 \(float\)$"),
        (lambda: numbers(1, pair=[1.0]), r"^numbers: pair must be tuple\[float, float\], got a tuple of float$"),
        (lambda: numbers(1, sizes="ab"), r"^numbers: sizes must be Sequence\[int\], got 'ab' \(str\)$"),
        (lambda: named(np.zeros((1, 3))), r"^named: wave must be Tensor \| None, got a numpy array of shape \[1, 3\] "),
        (lambda: named(np.zeros((1, 3))), r"float64; convert it with torch\.from_numpy$"),
        (lambda: named([[1.0, "x"]]), r"got a list of list$"),
        (lambda: named(None, "ab"), r"^named: names must be a list of texts, got the text 'ab'$"),
        (lambda: named(names="ab"), r"^named: names must be a list of texts, got the text 'ab'$"),
        (lambda: named(names=[torch.zeros(9)]), r"^named: names must be Sequence\[str\], got a list of Tensor$"),
        (lambda: Settings("3"), r"^Settings: size must be int, got '3' \(str\)$"),
        (lambda: Settings(3).resized(None), r"^Settings\.resized: size must be int, got None$"),
        (lambda: numbers(), "missing 1 required positional argument: 'whole'"),
    ],
)
def test_other_types_raise_a_type_error_of_one_line(call: Any, message: str) -> None:
    """It names the function and the argument, what is needed and what was passed."""
    with pytest.raises(TypeError, match=message):
        call()


def test_nan_is_no_number() -> None:
    """An argument that is NaN raises an error before a comparison with it is silently false."""

    @typed
    def options(**settings: float) -> None:
        pass

    for call, name in [
        (lambda: numbers(1, float("nan")), "real"),
        (lambda: options(weight=np.float64("nan")), "weight"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be a number, got NaN$"):
            call()


def test_messages_name_what_was_called() -> None:
    """Not the base class that has the constructor; and a missing text in a list of texts is no missing number."""

    class Base:
        @typed
        def __init__(self, size: int, texts: str | Sequence[str] = ()) -> None:
            pass

    class Derived(Base):
        pass

    with pytest.raises(TypeError, match="^Derived: size must be int, got 'x'"):
        Derived("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^Derived: texts must be texts, got NaN$"):
        Derived(1, ["a", float("nan")])  # type: ignore[list-item]


def test_a_wrong_type_is_named_even_if_other_arguments_are_missing() -> None:
    """The first mistake to report is the one that was passed."""
    with pytest.raises(TypeError, match="real must be float, got 'x'"):
        numbers(real="x")


def test_errors_of_the_function_itself_pass_unchanged() -> None:
    """A function that raises is called once."""
    calls = []

    @typed
    def fails(size: int) -> None:
        calls.append(size)
        raise TypeError("an error of the function")

    with pytest.raises(TypeError, match="an error of the function"):
        fails(3)
    assert calls == [3]


def test_checks_leave_the_global_random_generator_alone() -> None:
    """Checked sequences consume no numbers of Python's generator, which users seed."""
    state = random.getstate()
    for _ in range(20):
        numbers(1, sizes=list(range(100)))
    assert random.getstate() == state


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), 1e30, 10**400, float("nan"), np.float32("inf")])
def test_constructors_name_numbers_without_a_use(wrong: Any) -> None:
    """Infinite, huge and NaN, alone and in lists and tuples; functions accept infinite numbers."""

    class Sized:
        @typed
        def __init__(self, size: float = 1, *, pair: Sequence[float | tuple[float, float]] = (), **rest: float) -> None:
            pass

    for name, value in (("size", wrong), ("pair", [1, wrong]), ("pair", [(1, 2), (3, wrong)]), ("other", wrong)):
        with pytest.raises(ValueError, match=f"Sized: {name} must be a (finite )?number"):
            Sized(**{name: value})
    assert numbers(1, float("inf")) is not None


@pytest.mark.parametrize("size", [10**12, 10**18])
def test_sizes_that_do_not_fit_into_memory_are_named(size: int) -> None:
    """The message has the argument of the outer constructor, not that of an inner layer."""

    class Inner:
        @typed
        def __init__(self, width: int) -> None:
            self.weight = torch.empty(width, width)

    class Outer:
        @typed
        def __init__(self, dim: int, depth: int) -> None:
            self.inner = Inner(dim * depth)

    with pytest.raises(ValueError, match="Outer: dim=1e.1[28] is too large"):
        Outer(size, depth=2)
