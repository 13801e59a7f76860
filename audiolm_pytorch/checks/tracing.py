"""Functions for code that torch may compile, export or trace."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["is_traced", "not_compiled", "split_rows"]


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_traced() -> bool:
    """Whether the caller is compiled, exported or traced, so that code must not depend on values of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def split_rows(rows: Tensor, max_rows: int) -> Sequence[Tensor]:
    """Split the first axis of a tensor into parts of at most `max_rows` rows; a traced caller receives one part.

    A loop over parts would make the number of rows a constant of the traced program.
    """
    return (rows,) if is_traced() else rows.split(max_rows)


def not_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator of a function that torch.compile calls without compiling it, because its loops have varying sizes."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # torch.compiler.disable imports the compiler, a second of computing time.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        result: Result = torch.compiler.disable(function)(*args, **kwargs)
        return result

    return call
