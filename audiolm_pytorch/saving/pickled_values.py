"""What pickles hold besides text and plain containers: arrays of numbers from numpy, ordered dictionaries, sets."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from audiolm_pytorch.saving.restricted_pickle import (
    Fillable,
    RefusedPickleError,
    StandInClass,
    checked_key,
    set_entries,
)

__all__ = ["PLAIN_CLASSES", "ArrayType", "NumericArray"]

_NUMBER_TYPE = re.compile(r"[|<>=]?(b1|\?|[iu][1248]|f[248]|c8|c16)")
_MOST_AXES = 32
_MOST_NUMBERS = 2**63


class ArrayType(Fillable):
    """The type of the numbers in an array; types that hold Python objects, records or text are refused.

    Args:
        code: As numpy pickles it: kind and size, e.g. "f8".

    Raises:
        RefusedPickleError: If it is anything but numbers.
    """

    def __init__(self, code: Any) -> None:
        if isinstance(code, str) and code.lstrip("|<>=").startswith("O"):
            raise RefusedPickleError(
                "is refused: it holds an array of Python objects, which is a pickle of its own; write the file again "
                "with arrays of numbers only"
            )
        if not isinstance(code, str) or not _NUMBER_TYPE.fullmatch(code):
            raise RefusedPickleError("is refused: it holds an array of something other than numbers")
        self.dtype = np.dtype(code)

    def fill(self, state: Any) -> None:
        """Take over the byte order."""
        _, order, subtype, names, fields, *_ = state
        if (subtype, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise RefusedPickleError("is refused: it holds an array of records; only arrays of numbers are read")
        self.dtype = self.dtype.newbyteorder(order)


class NumericArray(Fillable):
    """An array of numbers; `array` is in this machine's byte order, perhaps read-only, and None until it was read."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        """Take over what numpy pickles: version, shape, type, order, bytes."""
        _, shape, kind, is_fortran, data = state
        self.take(data, kind, shape, "F" if is_fortran else "C")

    def take(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        """Make the array from its bytes.

        Args:
            data: Exactly as many bytes as the shape needs.
            kind: An `ArrayType`.
            shape: A tuple of sizes.
            order: "C" or "F".

        Raises:
            RefusedPickleError: If these do not fit together.
        """
        is_whole = isinstance(data, bytes | bytearray) and len(data) == bytes_needed(kind, shape)
        if not is_whole or order not in ("C", "F"):
            raise RefusedPickleError("is damaged: it declares an array and does not hold its bytes")
        numbers = np.frombuffer(data, dtype=kind.dtype)
        numbers = numbers.reshape(shape[::-1]).transpose() if order == "F" else numbers.reshape(shape)
        self.array = numbers.astype(kind.dtype.newbyteorder("="), copy=False)


def bytes_needed(kind: Any, shape: Any) -> int:
    """Bytes of an array.

    Raises:
        RefusedPickleError: If the type is no `ArrayType`, or the shape none that an array can have.
    """
    is_shape = (
        isinstance(shape, tuple)
        and len(shape) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < _MOST_NUMBERS for size in shape)
    )
    if not isinstance(kind, ArrayType) or not is_shape:
        raise RefusedPickleError("is damaged: it holds an array without a proper type and shape")
    return prod(shape) * int(kind.dtype.itemsize)


def _array_type(code: Any, *flags: Any) -> ArrayType:
    return ArrayType(code)


def _new_array(*arguments: Any) -> NumericArray:
    return NumericArray()


def _array_from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> NumericArray:
    made = NumericArray()
    made.take(data, kind, shape, order)
    return made


def _scalar(kind: Any, data: Any) -> Any:
    array = _array_from_buffer(data, kind, (1,), "C").array
    return None if array is None else array.item()


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedPickleError("is refused: it encodes text in a way that no array needs")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _dict_of(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    set_entries(made, [part for key, value in pairs for part in (key, value)])
    return made


def _empty_dict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _set_of(items: Any = ()) -> set[Any]:
    return set(map(checked_key, items))


def _frozenset_of(items: Any = ()) -> frozenset[Any]:
    return frozenset(map(checked_key, items))


def _plain_classes() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _dict_of,
        ("collections", "defaultdict"): _empty_dict,
        ("_codecs", "encode"): _encoded,
        ("numpy", "dtype"): _array_type,
        ("numpy", "ndarray"): StandInClass("numpy.ndarray"),
    }
    for module in ("builtins", "__builtin__"):
        for name in ("dict", "list", "tuple", "int", "float", "str", "bool"):
            table[module, name] = StandInClass(name)
        table |= {(module, "set"): _set_of, (module, "frozenset"): _frozenset_of, (module, "bytes"): _no_bytes}
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _new_array
        table[f"{core}.multiarray", "scalar"] = _scalar
        table[f"{core}.numeric", "_frombuffer"] = _array_from_buffer
    return table


# What a `RestrictedUnpickler` may be allowed without a thought: containers, and arrays of numbers.
PLAIN_CLASSES: Mapping[tuple[str, str], Any] = _plain_classes()
