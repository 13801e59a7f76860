"""The device of a module, a context manager for eval mode, and a check of sizes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["check_positive", "check_shares", "device_of", "eval_mode", "module_dict"]

_lock, _num_users = RLock(), WeakKeyDictionary[nn.Module, int]()  # number of `with` blocks that a module is in


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter or buffer of a module; the CPU if the module has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def check_positive(**sizes: int | Sequence[int] | None) -> None:
    """Check that each size of a module, or each of its sizes, is at least 1; None is allowed.

    The ValueError names the argument.
    """
    for name, value in sizes.items():
        if value is None:
            continue
        values = [value] if isinstance(value, int) else list(value)
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_shares(**shares: float) -> None:
    """Check that each share or probability is in 0..1; the ValueError names the argument."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}")


def module_dict(modules: Mapping[str, nn.Module], what: str) -> nn.ModuleDict:
    """Return a `ModuleDict` of modules; a ValueError names those of `what` whose name torch does not allow."""
    empty = nn.ModuleDict()
    wrong = [name for name in modules if not name or "." in name or hasattr(empty, name)]
    if wrong:
        raise ValueError(f"{what} cannot be called {wrong}; choose names without dots that are no methods of modules")
    return nn.ModuleDict(dict(modules))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode in a `with` block, then restore the mode of every submodule."""
    with _lock:  # several threads can use one module
        training = [part for part in module.modules() if part.training or _num_users.get(part)]
        for part in training:
            part.training, _num_users[part] = False, _num_users.get(part, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for part in training:
                _num_users[part] -= 1
                part.training = _num_users[part] == 0
