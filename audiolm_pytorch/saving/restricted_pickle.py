"""Pickles of others, read as data: an interpreter of the format that imports nothing and calls nothing they name.

Python's own unpickler is a loader of programs; restricting it still leaves attributes and state setters of live objects
in reach of the file. This one knows the same instructions (as `pickletools` decodes them) and answers them with plain
containers, numbers, inert stand-ins and what a table gives; whatever else a file asks for is refused.
"""

import pickletools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import IO, Any

from beartype import beartype

__all__ = [
    "Fillable",
    "RefusedPickleError",
    "RestrictedUnpickler",
    "StandIn",
    "StandInClass",
    "UnreadableFileError",
    "checked_file",
    "checked_key",
    "one_line_errors",
    "set_entries",
]

# Instructions whose argument is the value itself.
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_MAGIC_NAME = re.compile(r"__\w*__")
_LONGEST_NAME = 256
_MOST_IN_KEY, _MOST_BITS = 8, 64
# A published HuBERT takes 11,000 steps. A step makes 200 bytes at most, and copies come dearer.
_MOST_STEPS = 2**21
_BYTES_A_STEP = 64


class RefusedPickleError(ValueError):
    """A file asks for something that is not data; the message says for what, and goes on from the file's name."""


class UnreadableFileError(ValueError):
    """A file is not read: it is damaged or refused; the message is one line with its name and the mend."""


class StandInClass:
    """What a class, type or function of a package that is not here becomes: a name.

    Args:
        name: Module and name, as the file has them.
    """

    def __init__(self, name: str) -> None:
        self.name = name


class StandIn:
    """What an object of such a class becomes: whatever the file gives to it, kept and never acted upon.

    Args:
        name: Module and name of its class.
        arguments: What it was made from.

    Attributes:
        state: What its attributes were set from.
        appended: Items appended to it.
        entries: Entries set in it.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.appended: list[Any] = []
        self.entries: dict[Any, Any] = {}

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes that the real object would have: its state, with what lay in slots."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


class Fillable:
    """An object of ours that a file may give a state to."""

    def fill(self, state: Any) -> None:
        """Take over a state, or raise `RefusedPickleError`."""
        raise RefusedPickleError("gives a state to an object that has none")


class RestrictedUnpickler:
    """Reads one pickle without importing, looking up or calling anything that it names.

    Args:
        file: Where the pickle starts (binary, with read, readline and tell); left behind its end.
        allowed: Module and name to what stands for it. Functions among these are called with what the file gives
            them, so they must bear anything; all else is only passed on.
        stand_in_roots: Packages or modules whose classes become inert stand-ins.
        source: How error messages call the file.
        persistent_load: What answers references out of the pickle; None = they are refused.
    """

    @beartype
    def __init__(
        self,
        file: Any,
        allowed: Mapping[tuple[str, str], Any],
        stand_in_roots: Collection[str],
        *,
        source: str | Path = "the file",
        persistent_load: Callable[[Any], Any] | None = None,
    ) -> None:
        self._file: IO[bytes] = file
        self._allowed = allowed
        self._roots = tuple(stand_in_roots)
        self._source = source
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._steps_left = _MOST_STEPS

    def load(self) -> Any:
        """Read the pickle.

        Returns:
            What it holds: plain containers, numbers, text, `StandIn` and what `allowed` makes.

        Raises:
            UnreadableFileError: If it asks for anything else, or is damaged.
        """
        with one_line_errors(self._source):
            for opcode, argument, _ in pickletools.genops(self._file):
                self._spend(1)
                if opcode.name == "STOP":
                    return self._stack.pop()
                if opcode.name in _LITERALS:
                    self._stack.append(argument)
                elif not (self._container_step(opcode.name) or self._memo_step(opcode.name, argument)):
                    self._object_step(opcode.name, argument)
            raise EOFError("there is no end")

    def find_class(self, module: str, name: str) -> Any:
        """Answer a name: from the table, with a stand-in, or not at all.

        Args:
            module: Module that the file names.
            name: What it wants of it; the table is asked for the whole of it, dots included.

        Returns:
            What the table has, or a `StandInClass`.

        Raises:
            RefusedPickleError: If it is neither in the table nor a class under one of the roots.
        """
        if max(len(module), len(name)) > _LONGEST_NAME:  # the file may have a long one once, and join it often
            raise RefusedPickleError(f"is refused: it names {name[:40]!r} of {module[:40]!r}, which is no class's name")
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        parts = f"{module}.{name}".split(".")
        # nested classes have dots too, but a path through `__globals__` is no class
        is_class = all(part.isidentifier() for part in parts) and not any(map(_MAGIC_NAME.fullmatch, parts))
        if is_class and any(f"{module}.".startswith(f"{root}.") for root in self._roots):
            return StandInClass(f"{module}.{name}")
        raise RefusedPickleError(
            f"is refused: it names {f'{module}.{name}'[:160]!r}, which is not data (nothing of it was run); take the "
            "file as its publisher gives it"
        )

    def _container_step(self, name: str) -> bool:
        """Carry out an instruction about containers; False where it is about something else."""
        stack = self._stack
        match name:
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                made: dict[Any, Any] = {}
                set_entries(made, self._since_mark())
                stack.append(made)
            case "FROZENSET":
                stack.append(frozenset(map(checked_key, self._since_mark())))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if name == "APPEND" else self._since_mark()
                _add_items(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                parts = self._pop(2) if name == "SETITEM" else self._since_mark()
                set_entries(stack[-1], parts)
            case _:
                return False
        return True

    def _memo_step(self, name: str, argument: Any) -> bool:
        """Carry out an instruction about the stack and the memo; False where it is about something else."""
        stack, memo = self._stack, self._memo
        match name:
            case "PROTO" | "FRAME":
                pass
            case "POP":
                # as Python does: on a mark, the mark goes
                self._marks.pop() if self._marks and self._marks[-1] == len(stack) else stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case _:
                return False
        return True

    def _object_step(self, name: str, argument: Any) -> None:
        """Carry out an instruction that names, makes or fills an object."""
        stack = self._stack
        match name:
            case "GLOBAL":
                module, _, wanted = argument.partition(" ")
                stack.append(self.find_class(module, wanted))
            case "STACK_GLOBAL":
                module, wanted = self._pop(2)
                if not isinstance(module, str) or not isinstance(wanted, str):
                    raise RefusedPickleError("is refused: it names a class by something that is no text")
                stack.append(self.find_class(module, wanted))
            case "REDUCE" | "NEWOBJ":
                callee, arguments = self._pop(2)
                self._spend(_steps_to_copy(arguments))
                stack.append(_made(callee, arguments))
            case "NEWOBJ_EX":
                callee, arguments, keywords = self._pop(3)
                stack.append(_made(callee, arguments, keywords))
            case "BUILD":
                (state,) = self._pop(1)
                self._spend(_steps_to_copy(state))
                _fill(stack[-1], state)
            case "BINPERSID" if self._persistent_load is not None:
                (wanted,) = self._pop(1)
                stack.append(self._persistent_load(wanted))
            case _:
                raise RefusedPickleError(f"is refused: it uses the pickle instruction {name}, which no such file needs")

    def _spend(self, steps: int) -> None:
        """Count steps, and end a file that takes more than there is memory for."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise RefusedPickleError(
                f"is refused: it takes more than {_MOST_STEPS} steps to read; take the file as its publisher gives it"
            )

    def _pop(self, count: int) -> list[Any]:
        """The last values of the stack, taken away."""
        if len(self._stack) < count:
            raise IndexError("stack is empty")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        """The values above the last mark, taken away with it."""
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values


def checked_key(key: Any) -> Any:
    """A key of a dictionary or member of a set; nested and large ones are refused, whose hashes may take for ever."""
    members = key if isinstance(key, tuple) else (key,)
    if len(members) > _MOST_IN_KEY or not all(map(_is_quick_to_hash, members)):
        raise RefusedPickleError(f"is refused: it has a {type(key).__name__} as a key, where text or numbers belong")
    return key


def _is_quick_to_hash(part: Any) -> bool:
    if isinstance(part, int):
        return part.bit_length() <= _MOST_BITS
    return part is None or isinstance(part, str | bytes | float | StandIn | StandInClass)


def _steps_to_copy(given: Any) -> int:
    """What is counted for values that a function takes over: a file may give the same large one to it many times."""
    parts = (given, *given) if isinstance(given, tuple) else (given,)
    members = sum(len(part) for part in parts if isinstance(part, tuple | list | set | frozenset))
    return members + sum(len(part) for part in parts if isinstance(part, str | bytes | bytearray)) // _BYTES_A_STEP


def set_entries(target: Any, parts: Iterable[Any]) -> None:
    """Set entries of a dictionary or a stand-in from keys and values in turn."""
    if type(target) is not dict and not isinstance(target, StandIn):
        raise RefusedPickleError(f"is refused: it sets entries of a {type(target).__name__}")
    entries = target.entries if isinstance(target, StandIn) else target
    flat = list(parts)
    entries.update(zip(map(checked_key, flat[::2]), flat[1::2], strict=True))


def _add_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, StandIn):
        target.appended.extend(items)
    elif type(target) is list:
        target.extend(items)
    elif type(target) is set:
        target.update(map(checked_key, items))
    else:
        raise RefusedPickleError(f"is refused: it adds items to a {type(target).__name__}")


def _made(callee: Any, arguments: Any, keywords: Any = None) -> Any:
    """What comes of calling something: a stand-in, or what a function of the table makes."""
    if not isinstance(arguments, tuple):
        raise RefusedPickleError("is refused: it makes an object from something that is no list of arguments")
    if isinstance(callee, StandInClass):
        return StandIn(callee.name, (arguments, keywords) if keywords else arguments)
    if isinstance(callee, FunctionType) and not keywords:
        return callee(*arguments)
    raise RefusedPickleError(f"is refused: it calls a {type(callee).__name__}")


def _fill(target: Any, state: Any) -> None:
    if isinstance(target, StandIn):
        target.state = state
    elif isinstance(target, Fillable):
        target.fill(state)
    elif type(target) is not dict:  # attributes of an OrderedDict: versions of modules, which nobody reads
        raise RefusedPickleError(f"is refused: it gives a state to a {type(target).__name__}")


@contextmanager
def one_line_errors(source: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line that names it.

    A damaged file fails anywhere: in archives, compression, the stack of a pickle, numbers or text.

    Args:
        source: The file.

    Yields:
        Nothing.

    Raises:
        UnreadableFileError: If it is refused, or anything else goes wrong.
    """
    try:
        yield
    except UnreadableFileError:
        raise
    except RefusedPickleError as error:
        raise UnreadableFileError(f"{source} {_one_line(str(error))}") from error
    except Exception as error:
        reason = _one_line(f"{type(error).__name__}: {error}")[:120]
        raise UnreadableFileError(f"{source} is damaged or cut short ({reason}); download or copy it again") from error


def _one_line(message: str) -> str:
    """A message without line breaks or control characters, which a terminal would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in message[:2000]).split())


@beartype
def checked_file(path: str | Path, mend: str) -> Path:
    """Check that there is a file with something in it.

    Args:
        path: The file.
        mend: What to do where there is none.

    Returns:
        The path.

    Raises:
        ValueError: If it is missing, a folder, empty, or may not be read.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, a file is needed: {mend}")
        if not path.is_file():
            raise ValueError(f"there is no file {path}: {mend}")
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {mend}") from error
    if not first:
        raise ValueError(f"{path} is empty: {mend}")
    return path
