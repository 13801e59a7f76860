"""Read a pickle as data only: no class or function that the file names is imported or called.

Published checkpoints and k-means files are pickles. The weights-only loader of torch rejects calls, but a file of 1 MB
can make the loader of torch fill 8 GB with copies of containers. This module replaces every object of a class by a
`StandIn`, copies nothing, and limits the number of pickle instructions, which bounds time and memory.
"""

import pickle
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from audiolm_pytorch.saving.text import joined_lines, one_line

__all__ = ["ClassName", "DataUnpickler", "RefusedFileError", "StandIn", "one_line_errors"]

# Instructions for plain data, tensors, arrays and objects, as protocols 2 to 5 write them.
_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL "
    "STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
).split()
# A published HuBERT has 11,000 instructions; one instruction takes at most about 200 bytes of memory.
_MAX_INSTRUCTIONS = 2**20
_MAX_NAME_LENGTH = 256
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
_DUNDER = re.compile(r"__\w*__")
_Unpickler: Any = pickle._Unpickler  # the unpickler of pickle that is written in Python


class RefusedFileError(ValueError):
    """Error for a file with content that is not allowed; `one_line_errors` adds the file name and advice."""


class ClassName:
    """Placeholder for a pickled class or function; `name` is the full name, including the module."""

    def __init__(self, name: str) -> None:
        self.name = name


class StandIn:
    """Placeholder for a pickled object: the name of its class, its constructor arguments, and its pickled state."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class DataUnpickler(_Unpickler):
    """Python's unpickler with a list of allowed instructions and names; every object becomes a `StandIn`.

    A pickle may name the classes and functions in `names` (full names), and all classes of the packages `roots`. After
    `load`, the position in the binary file is at the end of the pickle.
    """

    def __init__(self, file: Any, names: Collection[str], roots: Collection[str]) -> None:
        super().__init__(file)
        self._names, self._roots = frozenset(names), tuple(f"{root}." for root in roots)
        self.dispatch = _Instructions()

    def find_class(self, module: str, name: str) -> ClassName:
        """Return a `ClassName` for a class, without importing it."""
        if max(len(module), len(name)) > _MAX_NAME_LENGTH:
            raise RefusedFileError("the file is refused: it has a class name of more than 256 characters")
        full_name = f"{module}.{name}"
        parts = full_name.split(".")
        is_class = all(part.isidentifier() for part in parts) and not any(map(_DUNDER.fullmatch, parts))
        if full_name not in self._names and not (is_class and full_name.startswith(self._roots)):
            raise RefusedFileError(
                f"the file is refused: it names {full_name[:160]!r}, which is not data (nothing of it was run)"
            )
        return ClassName(full_name)

    def finish(self, stand_in: StandIn) -> Any:
        """Return the value that replaces a `StandIn` after its state was read; a subclass may read more of the file."""
        return stand_in

    def load_reduce(self) -> None:
        """Replace a pickled call by a `StandIn` with the name and the arguments of the call; nothing is called."""
        arguments = self.stack.pop()
        callee = self.stack.pop()
        if type(callee) is not ClassName or type(arguments) is not tuple:
            raise RefusedFileError(f"the file is refused: it has an invalid call of a {type(callee).__name__}")
        if callee.name in _DICTIONARIES and (not arguments or callee.name == _DICTIONARIES[1]):
            self.append({})
        else:
            self.append(StandIn(callee.name, arguments))

    load_newobj = load_reduce

    def load_build(self) -> None:
        """Store the pickled state of an object in its `StandIn`; the state of an OrderedDict is dropped."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is StandIn:
            target.state = state
            self.stack[-1] = self.finish(target)
        elif type(target) is not dict:
            raise RefusedFileError(f"the file is refused: it sets the state of a {type(target).__name__}")

    def load_setitem(self) -> None:
        """Check a key, then add the key and its value to a dictionary."""
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Check several keys, then add the keys and their values to a dictionary."""
        _check_keys(self.stack[::2])
        super().load_setitems()


def _check_keys(keys: list[Any]) -> None:
    """Reject dictionary keys that may take long to hash or to compare: tuples and large integers."""
    for key in keys:
        is_number = isinstance(key, float) or (isinstance(key, int) and key.bit_length() <= 64)
        if not is_number and key is not None and not isinstance(key, str | bytes | StandIn | ClassName):
            raise RefusedFileError(f"the file is refused: it has a {type(key).__name__} as a key of a dictionary")


class _Instructions:
    """Functions that run the allowed pickle instructions, up to a total of `_MAX_INSTRUCTIONS`."""

    def __init__(self) -> None:
        self._left = _MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[[DataUnpickler], None]:
        self._left -= 1
        if self._left < 0:
            raise RefusedFileError(f"the file is refused: reading it takes more than {_MAX_INSTRUCTIONS} steps")
        if code not in _LOADERS:
            raise RefusedFileError(f"the file is refused: its pickle instruction {code:#04x} is not allowed for data")
        return _LOADERS[code]


_CODES = [getattr(pickle, name)[0] for name in _INSTRUCTIONS]
_LOADERS = {code: getattr(DataUnpickler, _Unpickler.dispatch[code].__name__) for code in _CODES}


@contextmanager
def one_line_errors(source: str | Path, advice: str) -> Iterator[None]:
    """Convert any error in a `with` block into a ValueError with a message of one line: file, reason and advice."""
    try:
        yield
    except RefusedFileError as error:
        raise ValueError(f"{source}: {joined_lines(error)}; {advice}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{source} cannot be read ({error.strerror}); {advice}") from error
        reason = one_line(error, 120)
        raise ValueError(f"{source} is damaged or cut short ({reason}); download or copy it again") from error
