"""Type checks of arguments at run time, with conversion of numpy numbers and lists."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from beartype import BeartypeConf, beartype

from audiolm_pytorch.checks.names import unknown_arguments

__all__ = ["described", "keep_arguments", "named", "typed", "usable_device"]

Target = TypeVar("Target", bound=Callable[..., Any])
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _WrongTypeError(TypeError):
    """An argument of another type than annotated, with beartype's message."""


class _TooLargeError(ValueError):
    """An argument with which an object does not fit into memory."""


# Types of arguments in which NaN and infinity are looked for. Lists of other objects cost little.
_PLAIN = frozenset((float, int))
_SCANNED = _PLAIN | {np.float64, np.float32, np.float16, list, tuple}
# Seeds, the largest numbers with a use, are smaller.
_TOO_LARGE, _INFINITE = 2**64, (float("inf"), -float("inf"))

_TEXTS = Sequence[str]  # a text is a sequence of its letters, but not meant as one

_beartype = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # whole numbers where floats are annotated
        is_random=False,  # leaves Python's global random generator alone
        violation_param_type=_WrongTypeError,
        violation_return_type=TypeError,
        is_color=False,
    )
)


def typed(target: Target) -> Target:
    """Decorate a function, or the public methods of a class, to raise a TypeError for arguments of other types.

    Whole numbers are accepted where `float` is annotated, numpy numbers where Python's are, and lists where tuples are.
    The function receives numpy numbers and lists converted if the annotation needs that. A number that is NaN or
    2^64 or more raises a ValueError, as an empty path does. So does a number of a constructor that is infinite, or with
    which the object does not fit into memory.
    """
    if isinstance(target, type):
        for name, method in list(vars(target).items()):
            if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
                setattr(target, name, typed(method))
        return target
    checked = _beartype(target)
    code = target.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    hints = target.__annotations__
    lists_of_texts = [place for place in enumerate(names) if hints.get(place[1]) in (_TEXTS, _TEXTS | None)]
    is_constructor = target.__name__ == "__init__"

    @functools.wraps(checked)
    def call(*args: Any, **keywords: Any) -> Any:
        while True:
            for value in (*args, *keywords.values()):
                kind = type(value)
                if kind in _PLAIN:
                    is_wrong = not -_TOO_LARGE < value < _TOO_LARGE  # fast; also True for NaN
                else:
                    is_wrong = kind in _SCANNED and any(_is_wrong(item, is_constructor) for item in _numbers(value))
                if is_wrong:
                    _refuse_number(target, _bound(target, args, keywords), is_constructor)
                if kind is str and not value:
                    _refuse_empty_path(_bound(target, args, keywords))
            for number, name in lists_of_texts:
                if isinstance(value := args[number] if number < len(args) else keywords.get(name), str):
                    raise TypeError(
                        f"{_name_of(target, args)}: {name} must be a list of texts, got the text {value!r:.60}"
                    )
            try:
                return checked(*args, **keywords)
            except _WrongTypeError as error:
                violation = str(error)
            except (RuntimeError, TypeError, OverflowError, MemoryError, _TooLargeError) as error:
                if isinstance(error, TypeError):
                    _refuse_unknown(target, args, keywords)
                if not is_constructor or not _is_size_error(error):
                    raise
                _refuse_size(target, _bound(target, args, keywords), error)
            arguments = _bound(target, args, keywords)
            _convert_argument(target, arguments, violation)
            args, keywords = arguments.args, arguments.kwargs

    return call  # type: ignore[return-value]


def keep_arguments(instance: Any, arguments: Mapping[str, Any]) -> None:
    """Make constructor arguments attributes of an instance; existing attributes do not change."""
    for name, value in arguments.items():
        if not hasattr(instance, name):
            setattr(instance, name, value)


def named(target: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a method to raise the TypeError of `typed` for unknown keyword arguments, without checks of types.

    Torch can export, trace and compile the method.
    """
    known = tuple(inspect.signature(target).parameters)

    @functools.wraps(target)
    def call(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        for name in keywords:
            if name not in known:
                _refuse_unknown(target, args, keywords)
        return target(*args, **keywords)

    return call


def _refuse_unknown(target: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Raise a TypeError with advice for all keywords that are no arguments of a function."""
    parameters = inspect.signature(target).parameters
    unknown = [name for name in keywords if name not in parameters]
    if unknown and not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        known = [name for name in parameters if name not in ("self", "cls")]
        raise unknown_arguments(_name_of(target, args), unknown, known) from None


def _bound(target: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]) -> inspect.BoundArguments:
    """Return the arguments of a call by name; raise a TypeError with advice if a keyword is unknown."""
    _refuse_unknown(target, args, keywords)
    return inspect.signature(target).bind_partial(*args, **keywords)


def _numbers(value: Any) -> Iterator[float]:
    """Yield a number, or the numbers in a list or tuple, or in lists and tuples in it."""
    if isinstance(value, list | tuple):
        for item in value:
            if type(item) in _SCANNED:
                yield from _numbers(item)
    elif isinstance(value, np.floating):
        yield value.item()
    elif isinstance(value, int | float):
        yield value


def _is_wrong(number: float, is_constructor: bool) -> bool:
    """Whether a number is NaN, so large that it is of no use, or infinite in a constructor."""
    return number != number or (abs(number) >= _TOO_LARGE and (is_constructor or number not in _INFINITE))


def _refuse_number(target: Callable[..., Any], arguments: inspect.BoundArguments, is_constructor: bool) -> None:
    """Raise a ValueError that names the arguments that contain a wrong number."""
    for name, value in _named_values(arguments):
        if wrong := [number for number in _numbers(value) if _is_wrong(number, is_constructor)]:
            place = f"{_name_of(target, arguments.args)}: {name}"
            if wrong[0] != wrong[0]:
                hint = str(target.__annotations__.get(name))
                needed = "texts" if "str" in hint and not re.search("int|float", hint) else "a number"
                raise ValueError(f"{place} must be {needed}, got NaN")
            shown = f"{wrong[0].bit_length()} bits" if isinstance(wrong[0], int) else f"{wrong[0]:g}"
            raise ValueError(f"{place} must be a finite number below 2**64, got {shown}")


def _refuse_empty_path(arguments: inspect.BoundArguments) -> None:
    """Raise a ValueError that names an empty path or device; "" would be the current folder."""
    for name, value in arguments.arguments.items():
        hint = inspect.formatannotation(arguments.signature.parameters[name].annotation)
        if type(value) is str and not value and ("Path" in hint or "device" in hint):
            advice = "; pass . for the current folder" if "Path" in hint else ""
            raise ValueError(f"{name} must not be empty{advice}")


def _is_size_error(error: Exception) -> bool:
    is_known = isinstance(error, MemoryError | OverflowError | _TooLargeError)
    return is_known or re.search("memory|[Oo]verflow|too large", str(error)) is not None


def _refuse_size(target: Callable[..., Any], arguments: inspect.BoundArguments, error: Exception) -> None:
    """Raise a ValueError with the largest argument of an object that does not fit into memory."""
    sizes = [(abs(number), name) for name, value in _named_values(arguments) for number in _numbers(value)]
    if not sizes:
        raise error
    size, name = max(sizes)
    raise _TooLargeError(
        f"{_name_of(target, arguments.args)}: {name}={size:g} is too large, the weights do not fit into memory; use "
        "smaller sizes"
    ) from error


def _named_values(arguments: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.arguments.items():
        if arguments.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _name_of(target: Callable[..., Any], arguments: Sequence[Any]) -> str:
    """Return the name of a function; a constructor has the name of the class that is built, not of a base class."""
    if target.__name__ == "__init__" and arguments:
        return type(arguments[0]).__name__
    return target.__qualname__.replace("<locals>.", "")


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device; raise a ValueError if this machine does not have it, or torch has no such device."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without CUDA
        raise ValueError(f"the device {device} cannot be used on this machine; use another, such as cpu") from error


def described(value: Any) -> str:
    """Return the type, and the shape or a short form of the value, for an error message."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray):
        name = "a tensor" if isinstance(value, torch.Tensor) else "a numpy array"
        return f"{name} of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, list | tuple | set | dict):
        items = {type(item).__name__ for item in (value.values() if isinstance(value, dict) else value)}
        return f"a {kind} of {', '.join(sorted(items))}" if items else f"an empty {kind}"
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str | int | float | complex):
        text = repr(value)
        return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {kind}"


def _convert_argument(target: Callable[..., Any], arguments: inspect.BoundArguments, violation: str) -> None:
    """Convert the argument that beartype's message names, or raise a TypeError of one line."""
    found = re.search(r"\bparameter (\w+)=", violation)
    if found is None or found[1] not in arguments.arguments:
        raise TypeError(violation)
    name = found[1]
    value = arguments.arguments[name]
    hint = inspect.formatannotation(arguments.signature.parameters[name].annotation)
    hint = re.sub(r"(?:\w+\.)+(?=\w)", "", hint).strip("'")
    plain = _plain(value, "tuple[" in hint)
    if plain is not None:
        arguments.arguments[name] = plain
        return
    advice = ""
    has_numbers = isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value)
    if "Tensor" in hint and (isinstance(value, np.ndarray) or has_numbers):
        advice = f"; convert it with torch.{'from_numpy' if isinstance(value, np.ndarray) else 'tensor'}"
    if "ConditionTensor" in hint and isinstance(value, dict) and _has_tensor(value):
        advice = "; convert each tensor with ConditionTensor.of(tensor)"
    raise TypeError(f"{_name_of(target, arguments.args)}: {name} must be {hint}, got {described(value)}{advice}")


def _has_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a dict, also of dicts, that contains one."""
    return any(map(_has_tensor, value.values())) if isinstance(value, dict) else isinstance(value, torch.Tensor)


def _plain(value: Any, to_tuple: bool) -> Any:
    """Return numpy numbers, also those in a sequence, as Python numbers, and a list as tuple; None changes nothing."""
    if isinstance(value, np.generic):
        number = value.item()
        return None if isinstance(number, np.generic) else number
    if type(value) is list or type(value) is tuple:
        items = [item if (number := _plain(item, False)) is None else number for item in value]
        if to_tuple and isinstance(value, list):
            return tuple(items)
        return type(value)(items) if list(map(type, items)) != list(map(type, value)) else None
    return None
