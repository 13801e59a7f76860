"""Exported functions and classes with wrong arguments: documented results, or an error that names the argument."""

import inspect
import re
from typing import Any

import pytest
import torch

from tests.helpers.public_doors import (
    ALLOWED,
    BASE,
    exports,
    is_interface,
    resolve,
    typed_callables,
    wrong_values,
)

HARMLESS = {"zero", "empty", "no items"}  # a documented result is possible
QUICK = ("peak_safe", "resample", "average_latents", "code_usage", "ConditionTensor", "SoundStream", "MuLaN.forward")


def test_every_checked_argument_refuses_other_types() -> None:
    """All functions, constructors and methods with `typed` raise a TypeError that names the argument."""
    wrong, num_arguments = [], 0
    for name, function, has_self in typed_callables():
        if inspect.isgeneratorfunction(inspect.unwrap(function)):
            continue  # checked when the first value is requested
        for argument in inspect.signature(function).parameters.values():
            is_free = argument.annotation in (Any, object, inspect.Parameter.empty)
            if argument.name in ("self", "cls") or is_free or argument.kind > argument.KEYWORD_ONLY:
                continue
            if argument.kind is argument.VAR_POSITIONAL:
                continue
            num_arguments += 1
            try:
                function(*([None] if has_self else []), **{argument.name: NotImplemented})
            except TypeError as error:
                if f"{argument.name} must be" in str(error) and "\n" not in str(error):
                    continue
                wrong.append(f"{name}: {argument.name}: {error}")
            else:
                wrong.append(f"{name}: {argument.name} was accepted")
    assert num_arguments > 1000
    assert wrong == []


def test_every_export_has_a_row_of_valid_arguments() -> None:
    """A new export gets a row in `BASE`, or in `DATA_ROWS` if it needs files or published weights."""
    missing = [name for name, value in exports(modules=False).items() if not is_interface(value)]
    missing = sorted({*missing} - BASE.keys())
    assert missing == [], f"add valid arguments of {', '.join(missing)} to BASE in tests/helpers/public_doors.py"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BASE])
def test_wrong_values_raise_errors_that_name_the_argument(name: str) -> None:
    """Wrong ranks, dtypes, NaN, empty, zero, negative, arrays and lists, one argument at a time."""
    function, arguments, wrong = resolve(name), BASE[name](), []
    function(**arguments)
    for argument, value in arguments.items():
        for kind, bad in wrong_values(value).items():
            if argument == "self":
                continue
            torch.manual_seed(0)
            try:
                function(**{**BASE[name](), argument: bad})
            except (ValueError, TypeError) as error:
                if not re.search(rf"\b{argument}\b", str(error)):
                    wrong.append(f"{argument}, {kind}: not named in: {error}")
            except Exception as error:
                wrong.append(f"{argument}, {kind}: {error!r}")
            else:
                if kind not in HARMLESS | ALLOWED.get(f"{name}.{argument}", set()):
                    wrong.append(f"{argument}, {kind}: accepted")
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "argument", "size"),
    [
        *[
            ("MelSpectrogram", "win_length", 0),
            ("SoundStream", "attn_depth", -1),
            ("SoundStream", "target_sample_hz", 0),
        ],
        *[("StageTransformer", "cond_dim", 0), ("TokenTransformer", "cond_dim", 0), ("MusicGen", "max_seconds", 0.0)],
    ],
)
def test_sizes_without_a_meaning_are_refused(name: str, argument: str, size: float) -> None:
    """None of them builds a module that silently ignores the size."""
    with pytest.raises(ValueError, match=argument):
        resolve(name)(**{**BASE[name](), argument: size})
