"""Checks of the keyword arguments of trainers, with suggestions for unknown names."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from audiolm_pytorch.checks.names import unknown_arguments
from audiolm_pytorch.checks.types import keep_arguments
from audiolm_pytorch.saving.construction import preserve_rng

__all__ = ["trainer_arguments"]

Class = TypeVar("Class", bound=type)


def trainer_arguments(settings: type | None = None) -> Callable[[Class], Class]:
    """Return a class decorator: the constructor checks keyword names, and its arguments become attributes."""

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]
        known = [name for name in inspect.signature(init).parameters if name != "self"]
        if settings is not None:
            known[-1:] = [field.name for field in fields(settings)]  # instead of **settings

        @functools.wraps(init)
        def checked_init(self: Any, *args: Any, **keywords: Any) -> None:
            if unknown := [name for name in keywords if name not in known]:
                raise unknown_arguments(type(self).__name__, unknown, known)
            with preserve_rng():  # modules that the trainer creates
                init(self, *args, **keywords)
            arguments = inspect.signature(init).bind(self, *args, **keywords)
            arguments.apply_defaults()
            keep_arguments(self, {name: arguments.arguments[name] for name in known if name in arguments.arguments})

        cls.__init__ = checked_init  # type: ignore[misc]
        return cls

    return decorate
